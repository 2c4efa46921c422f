"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_atomically(target: Path, content: bytes) -> None:
    """Write a file so that whoever reads it, at any time, sees the old or the new content.

    Args:
        target (`Path`): The file, in an existing folder.
        content (`bytes`): All of it.

    Raises:
        OSError: it cannot be written; the old file is then as it was.
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
