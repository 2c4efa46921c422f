"""Writes `slsam_trace.safetensors` into a trainer's output folder, and into checkpoints to go on from."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from slsam_peft.algorithm.slsam import SLSAM
from slsam_peft.algorithm.trace import Trace
from slsam_peft.saving.atomic import write_atomically
from slsam_peft.saving.checksum import BLANK, add_checksum, verified_metadata
from slsam_peft.saving.trace_data import FILE_NAME, SCHEMA

WRITE_SECONDS = 5.0  # between two writes, at least
WRITE_SHARE = 1 / 400  # of the run's time, at most: the next write waits 400 times as long as the last one took

logger = logging.getLogger(__name__)


class TraceFile:
    """Records a run and writes what it recorded from time to time, and at its end.

    Recording must never end a training: where the file cannot be written, it says so once and stops.

    Args:
        slsam (`SLSAM`): What is recorded.
        folder (`str` or `Path`): The output folder.
        total (`int`): Steps the run will make; shown to whoever follows it.
        trace (`Trace`, *optional*): What to go on with; a new one where it is missing.
    """

    def __init__(self, slsam: SLSAM, folder: str | Path, total: int, trace: Trace | None = None) -> None:
        self.trace = trace or Trace([a.name for a in slsam.arms], [a.depth for a in slsam.arms])
        self._settings = {
            "config": slsam.config.to_dict(),
            "budget": slsam.config.cost_budget,
            "total": total,
        }
        self._fraction = slsam.sampler.mean
        self._folder = Path(folder)
        self._due = 0.0
        self._broken = False

    def see(self, step: int, slsam: SLSAM) -> None:
        """Record step `step`, counted from 1, and write if it is time to."""
        if self._broken:
            return
        self.trace.record(step, slsam)
        self._fraction = slsam.sampler.mean  # a cost budget is solved for the first batch that comes
        if time.monotonic() >= self._due:
            self._write(self._folder, done=False)

    def save(self, folder: str | Path) -> None:
        """Write a copy into a checkpoint's folder."""
        if not self._broken:
            self._write(Path(folder), done=False)

    def finish(self) -> None:
        """Write all that was recorded, as the trace of a run that is done."""
        if not self._broken and self.trace.steps:
            self._write(self._folder, done=True)

    def _write(self, folder: Path, done: bool) -> None:
        start = time.monotonic()
        plain = {**self.trace.plain(), **self._settings, "fraction": self._fraction, "done": done}
        try:
            metadata = {"schema": str(SCHEMA), "trace": json.dumps(plain), **BLANK}
            content = save(self.trace.tensors(), metadata=metadata)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / FILE_NAME, add_checksum(content))
        except OSError as error:
            self._broken = True
            logger.warning("%s cannot be written (%s): this run is no longer recorded.", folder / FILE_NAME, error)
        end = time.monotonic()
        self._due = end + max(WRITE_SECONDS, (end - start) / WRITE_SHARE)


def recorded_until(folder: str | Path, slsam: SLSAM, step: int) -> Trace | None:
    """Return the trace a checkpoint holds, ready to go on; `None` where it holds none of these arms up to `step`.

    Args:
        folder (`str` or `Path`): The checkpoint.
        slsam (`SLSAM`): What goes on being recorded.
        step (`int`): Steps made before the checkpoint.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        metadata = verified_metadata(content)
        if metadata["schema"] != str(SCHEMA):
            raise ValueError(f"schema {metadata['schema']}, and this version reads {SCHEMA}")
        plain: dict[str, Any] = json.loads(metadata["trace"])
        trace = Trace.restored(load(content), plain)
    except (OSError, KeyError, ValueError, TypeError) as error:
        logger.warning("%s is not gone on with (%s): the trace begins after step %d.", path, error, step)
        return None
    same = trace.names == [a.name for a in slsam.arms] and trace.depths == [a.depth for a in slsam.arms]
    return trace if same and trace.last == step else None
