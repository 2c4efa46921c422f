"""Files that are there whole or not at all."""

import os
import tempfile
from pathlib import Path


def write_atomically(target: Path, content: bytes) -> None:
    """Write a file so that whoever reads it, at any time, sees the old or the new content.

    Args:
        target (`Path`): The file, in an existing folder.
        content (`bytes`): All of it.

    Raises:
        OSError: it cannot be written; the old file is then as it was.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
