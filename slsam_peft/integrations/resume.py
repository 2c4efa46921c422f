"""Which checkpoints can be resumed from: one whose save was cut short (a kill, a full disk) is passed over."""

import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from slsam_peft.integrations.checkpoint import FILE_NAME

_UNFINISHED = "checkpoint-is-incomplete.txt"  # transformers' mark while it saves on SIGTERM
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_whole_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the newest checkpoint of a run that was saved whole.

    `trainer.train(resume_from_checkpoint=last_whole_checkpoint("out"))` goes on after a kill at any moment, also in
    the middle of a save, and starts afresh where there is nothing to go on from.

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`; need not exist.

    Returns:
        `str` or `None`: Path of a `checkpoint-<step>` folder; `None` where no checkpoint is whole.
    """
    found = [(int(match[1]), path) for path in _folders(folder) if (match := _CHECKPOINT.fullmatch(path.name))]
    return next((str(path) for _, path in sorted(found, reverse=True) if what_is_missing(path) is None), None)


def whole_checkpoint(asked: str | bool, folder: str) -> str:
    """Return the checkpoint that `resume_from_checkpoint=asked` means: a path, or `True` for the newest whole one.

    Raises:
        ValueError: `True`, and `folder` has no whole checkpoint; or the save of the one asked for was cut short.
    """
    if asked is not True:
        path = Path(str(asked))
        why = what_is_missing(path) if path.is_dir() else None
        if why and TRAINER_STATE_NAME in why:
            newest = last_whole_checkpoint(path.parent)
            instead = f"Go on from {newest}" if newest else "No other is whole: start afresh"
            raise ValueError(
                f"{path} was cut short while it was saved ({why}). {instead}; "
                "resume_from_checkpoint=True finds the newest whole checkpoint by itself."
            )
        return str(asked)
    newest = last_whole_checkpoint(folder)
    if newest is None:
        raise ValueError(
            f"resume_from_checkpoint=True, but output_dir={folder} has no whole checkpoint-<step> folder. Name the "
            "folder of the run to resume, or leave resume_from_checkpoint out to start afresh."
        )
    return newest


def what_is_missing(checkpoint: str | os.PathLike) -> str | None:
    """Return why a checkpoint is not whole, as the end of a sentence, or `None` where it is.

    The trainer writes `trainer_state.json` last, so a complete one vouches for the files before it; those are looked
    at nevertheless, at their ends only, for what a crash of the machine or a deletion under way takes away.
    """
    folder = Path(checkpoint)
    state = folder / TRAINER_STATE_NAME
    try:
        json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE_NAME} is cut short"
    if (folder / _UNFINISHED).exists():
        return f"{_UNFINISHED} is there"
    names = {path.name for path in folder.iterdir()}
    if FILE_NAME in names:  # all of what training goes on from is saved, or only the model
        missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if name not in names]
        missing += [] if any(name.startswith("rng_state") for name in names) else ["rng_state.pth"]
        if missing:
            return f"{missing[0]} is missing"
    cut = next((name for name in sorted(names) if not _is_complete(folder / name)), None)
    return cut and f"{cut} is cut short"


def _folders(folder: str | os.PathLike) -> Iterator[Path]:
    path = Path(folder)
    return (entry for entry in (path.iterdir() if path.is_dir() else ()) if entry.is_dir())


def _is_complete(file: Path) -> bool:
    """Whether a file of tensors is as long as it says: its header (safetensors), its last record (torch's zip)."""
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
