"""Writes files and folders that are there as a whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(target: Path, content: bytes) -> None:
    """Write a file so that whoever reads it, at any time, sees the old or the new content.

    Its permissions are those that any new file of the user's gets (by the umask).

    Args:
        target (`Path`): The file, in an existing folder.
        content (`bytes`): All that it is to hold.

    Raises:
        OSError: the file cannot be written; the old one is then as it was, and nothing is left beside it.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty scratch folder that takes `target`'s place when the block ends well, and vanishes otherwise.

    The files in it get the permissions of any new file of the user's.

    Args:
        target (`Path`): The folder, which need not exist; its parents are made.

    Raises:
        OSError: the disk cannot be written; an earlier folder is then as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        # safetensors writes files that nobody but their owner can read.
        for file in new.iterdir():
            file.chmod(new.stat().st_mode & 0o666)
        if target.exists():
            os.replace(target, Path(scratch) / "old")
        os.replace(new, target)


def nearest_folder(target: Path) -> Path:
    """Return what exists of the way to a folder: itself, or the nearest part above it."""
    path = target.absolute()
    return next(part for part in (path, *path.parents) if part.exists())


def try_to_write(folder: Path) -> None:
    """Try out whether a folder can be made in an existing one, and leave it as it was.

    Permissions alone do not tell: a file system may be read-only, or refuse folders to anyone.

    Raises:
        OSError: it cannot.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".slsam-peft-"):
        pass
