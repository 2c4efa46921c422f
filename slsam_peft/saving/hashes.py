"""Records the SHA-256 of each file that training goes on from in `slsam_files.json`, so that damage shows."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from slsam_peft.saving.atomic import write_atomically

HASHES_NAME = "slsam_files.json"

# What the trainer itself writes and reads; other files are their writers' own, who may change them later.
_STATE = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|(pytorch_)?model.*\.(safetensors|bin)"
)
_ADAPTER = re.compile(r"adapter_model\.(safetensors|bin)")


def write_hashes(folder: Path, checksummed: frozenset[str]) -> None:
    """Record the hashes of a checkpoint's files as they are now, atomically.

    Args:
        folder (`Path`): The checkpoint, all of whose files are written but `trainer_state.json`.
        checksummed (`frozenset[str]`): Names of files that hold their own checksum.

    Raises:
        OSError: the record cannot be written.
    """
    hashes = {name: _hash(path) for name, path in _files(folder) if name not in checksummed}
    write_atomically(folder / HASHES_NAME, json.dumps({"sha256": hashes}, indent=1).encode())


def damaged_files(folder: Path) -> Iterator[str]:
    """Yield what is wrong with a checkpoint by its record, each as the end of a sentence; nothing without a record.

    Files are found in the folder, never by the names in the record.

    Args:
        folder (`Path`): The checkpoint.
    """
    try:
        recorded = json.loads((folder / HASHES_NAME).read_text(encoding="utf-8"))["sha256"].items()
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{HASHES_NAME} is damaged"
        return
    files = dict(_files(folder))
    # Names in the record are compared with those found, and never followed.
    yield from (f"{name} is missing" for name, _ in recorded if name not in files)
    for name, expected in recorded:
        if name in files and _hash(files[name]) != expected:
            yield f"{name} is damaged: {HASHES_NAME} has another SHA-256 (delete that if the change is meant)"


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of each file that is recorded; PEFT gives each of several adapters a folder of its own."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        known = _ADAPTER.fullmatch(path.name) or (path.parent == folder and _STATE.fullmatch(path.name))
        if known and path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
