"""Finds checkpoints to resume from. One whose save was cut short (by a kill, by a full disk) is passed over."""

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from slsam_peft.saving.checkpoint import FILE_NAME
from slsam_peft.saving.checksum import DamagedError, verified_metadata
from slsam_peft.saving.hashes import damaged_files
from slsam_peft.saving.trace_data import FILE_NAME as TRACE_NAME

_UNFINISHED = "checkpoint-is-incomplete.txt"  # transformers' mark while it saves on SIGTERM
_ADAPTER = {ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME}
_MODEL = {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME}
# As accelerate saves sharded parameters and their optimizer (FSDP2): folders of pieces, or whole in one file.
_SHARDED_MODEL = {"pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"}
_SHARDED_OPTIMIZER = {"optimizer_0", "optimizer.bin"}
STATE_NAMES = (OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state.pth", FILE_NAME)  # what is saved beside a model
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


def last_intact_checkpoint(folder: str | os.PathLike, *, sampler: bool = True) -> str | None:
    """Return the newest intact checkpoint of a run. Newer ones are logged as warnings, with the reason.

    `trainer.train(resume_from_checkpoint=last_intact_checkpoint("out"))` goes on after a kill at any moment, also in
    the middle of a save, and starts afresh where there is nothing to go on from.

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`; need not exist.
        sampler (`bool`, *optional*, defaults to `True`): Whether the sampler's state must be there and undamaged;
            `False` for `SLSAMConfig(accept_state_mismatch=True)`.

    Returns:
        `str` or `None`: Path of a `checkpoint-<step>` folder; `None` where no checkpoint is intact.
    """
    newest, passed = _newest(folder, sampler)
    for path, why in passed.items():
        logger.warning("%s is passed over: %s.", path, why)
    return newest


def intact_checkpoint(asked: str | bool, folder: str, *, sampler: bool = True) -> str:
    """Return the checkpoint that `resume_from_checkpoint=asked` means: a path, or `True` for the newest intact one.

    A damaged or missing sampler state in one that is named is left to `load_state`, which can be told to accept it.

    Args:
        asked (`str` or `bool`): A path, or `True`.
        folder (`str`): The run's `output_dir`.
        sampler (`bool`, *optional*, defaults to `True`): For `True`, as in `last_intact_checkpoint`.

    Raises:
        ValueError: `True`, and `folder` has no intact checkpoint; or the one asked for is not intact.
    """
    if asked is not True:
        path = Path(str(asked))
        why = what_is_missing(path, sampler=False) if path.is_dir() else None
        if why:
            newest, _ = _newest(path.parent, sampler)
            instead = f"Go on from {newest}." if newest else "No other is intact: start afresh."
            raise ValueError(f"{path} is not intact: {why}. {instead}")
        return str(asked)
    newest, passed = _newest(folder, sampler)
    if newest is None:
        path, why = next(iter(passed.items()), (None, None))
        raise ValueError(
            f"resume_from_checkpoint=True, but output_dir={folder} has no intact checkpoint-<step> folder"
            + (f" (in {Path(path).name}, {why}). " if path else ". ")
            + ("accept_state_mismatch goes on without the sampler's state. " if FILE_NAME in (why or "") else "")
            + "Name the folder of the run to resume, or leave resume_from_checkpoint out to start afresh."
        )
    return newest


def _newest(folder: str | os.PathLike, sampler: bool) -> tuple[str | None, dict[str, str]]:
    """Return the newest intact checkpoint, and why each newer one is not."""
    passed: dict[str, str] = {}
    for path in reversed(checkpoints_in(folder)):
        why = what_is_missing(path, sampler=sampler)
        if why is None:
            return str(path), passed
        passed[str(path)] = why
    return None, passed


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """Return the `checkpoint-<step>` folders in a folder, intact or not, by their steps."""
    found = [(int(match[1]), path) for path in _folders(folder) if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def has_optimizer(checkpoint: str | os.PathLike) -> bool:
    """Return whether a checkpoint holds an optimizer's state: one of the model alone does not."""
    return any((Path(checkpoint) / name).exists() for name in (OPTIMIZER_NAME, *_SHARDED_OPTIMIZER))


def what_is_missing(checkpoint: str | os.PathLike, *, sampler: bool = True) -> str | None:
    """Return why a checkpoint is not intact, as the end of a sentence, or `None` where it is.

    The trainer writes `trainer_state.json` last, so a complete one vouches for the files before it; those are looked
    at nevertheless, for what a crash of the machine or a deletion under way takes away: transformers goes on
    without a file that is missing. With its record of hashes (`slsam_files.json`) any changed bit shows; checkpoints
    of earlier versions have none. One of the model alone (`save_only_model`) is intact.

    Args:
        checkpoint (`str` or `os.PathLike`): The folder.
        sampler (`bool`, *optional*, defaults to `True`): Whether `slsam.safetensors` is looked at.
    """
    return next(_faults(Path(checkpoint), sampler), None)


def _faults(folder: Path, sampler: bool) -> Iterator[str]:
    """Yield what is wrong with a checkpoint, what is cheap to see first."""
    # The trainer writes this file last.
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        yield f"{TRAINER_STATE_NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        yield f"{TRAINER_STATE_NAME} is cut short"
    if (folder / _UNFINISHED).exists():
        yield f"{_UNFINISHED} is there"
    # What should be there is, and is as long as it says.
    names = {path.name for path in folder.iterdir()}
    present = names - {TRACE_NAME, *(() if sampler else (FILE_NAME,))}  # a lost recording ends no training
    yield from (f"{name} is missing" for name in (*_lost_weights(folder, names), *_lost_state(names, sampler)))
    yield from (f"{name} is cut short" for name in sorted(present) if not _is_complete(folder / name))
    # Every bit is as it was written.
    yield from damaged_files(folder)
    if FILE_NAME in present:
        try:
            verified_metadata((folder / FILE_NAME).read_bytes())
        except (OSError, DamagedError) as error:
            yield f"{FILE_NAME} is damaged ({error})"


def _lost_weights(folder: Path, names: set[str]) -> Iterator[str]:
    """Yield names of weights that are missing: of each adapter that has a configuration, or of a full model."""
    adapters = [path for path in (folder, *sorted(_folders(folder))) if (path / ADAPTER_CONFIG_NAME).is_file()]
    for path in adapters:
        if not any((path / name).is_file() for name in _ADAPTER):
            yield str((path / ADAPTER_SAFE_WEIGHTS_NAME).relative_to(folder))
    if not adapters and not names & (_ADAPTER | _MODEL | _SHARDED_MODEL):
        yield SAFE_WEIGHTS_NAME


def _lost_state(names: set[str], sampler: bool) -> list[str]:
    """Return names of what training goes on from and is missing, where some of it is there."""
    lost = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if name not in names]
    if names & _SHARDED_OPTIMIZER and OPTIMIZER_NAME in lost:
        lost.remove(OPTIMIZER_NAME)
    lost += [] if any(name.startswith("rng_state") for name in names) else ["rng_state.pth"]
    alone = len(lost) == 3 and FILE_NAME not in names  # the model alone was saved
    if alone:
        return []
    return lost + ([FILE_NAME] if sampler and FILE_NAME not in names else [])


def _folders(folder: str | os.PathLike) -> Iterator[Path]:
    path = Path(folder)
    return (entry for entry in (path.iterdir() if path.is_dir() else ()) if entry.is_dir())


def _is_complete(file: Path) -> bool:
    """Return whether a file of tensors is as long as its header (safetensors) or last record (torch's zip) says."""
    if file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)
    if file.suffix != ".safetensors" or file.name.startswith("."):
        return True
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if not 0 < size < file.stat().st_size:
            return False
        try:
            header = json.loads(opened.read(size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return False
    return file.stat().st_size == 8 + size + max(ends, default=0)
