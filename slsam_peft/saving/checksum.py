"""Makes safetensors files show any damage: their metadata holds a SHA-256 over every byte of the file."""

import hashlib
import json
import re
from typing import Any

BLANK = {"sha256": "0" * 64}  # goes into the metadata of a file that is to get a checksum

_FIELD = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # as safetensors writes it; inside values, quotes are escaped


class DamagedError(ValueError):
    """A file is not what was written: it was cut short, or some of its bits have changed."""


def add_checksum(content: bytes) -> bytes:
    """Fill in the checksum of a safetensors file whose metadata has a place for it, `BLANK` or an earlier one.

    The checksum covers every byte of the file, with zeros in its own place.

    Args:
        content (`bytes`): The file.

    Raises:
        DamagedError: there is no such place.
    """
    start, end = _place(content)
    return content[:start] + _checksum(content, start, end) + content[end:]


def verified_metadata(content: bytes) -> dict[str, Any]:
    """Check a file and return its metadata. What passes is, bit for bit, what `add_checksum` returned.

    Args:
        content (`bytes`): The file.

    Raises:
        DamagedError: it was cut short or changed, or never had a checksum.
    """
    start, end = _place(content)
    if content[start:end] != _checksum(content, start, end):
        raise DamagedError("its SHA-256 is not the one it was written with")
    return json.loads(_header(content))["__metadata__"]


def _place(content: bytes) -> tuple[int, int]:
    """Return where the checksum begins and ends."""
    found = _FIELD.search(_header(content))
    if found is None:
        raise DamagedError("it holds no checksum, as every such file of schema 2 and later does")
    return 8 + found.start(1), 8 + found.end(1)


def _header(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _checksum(content: bytes, start: int, end: int) -> bytes:
    view = memoryview(content)  # a state that keeps gradients is large, so nothing is copied
    digest = hashlib.sha256(view[:start])
    digest.update(BLANK["sha256"].encode())
    digest.update(view[end:])
    return digest.hexdigest().encode()
