"""Rows lie in a JSONL file that any number of processes append to; each claims the job that it works on."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slsam_peft.errors import UserError

Row = dict[str, Any]

_APPENDING = "rows.lock"  # the one lock that is no claim
_NUMBERS = ("loss", "accuracy", "exact", "cost")


class RowStore:
    """A store is a file of rows, one JSON object per line, each under its `"key"`.

    A claim is a lock that the system drops when its process ends, however that ends: a killed worker blocks nobody.

    Args:
        path (`Path`): The file; it and its folder are created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks = path.parent / f".{path.name}.locks"

    def read(self) -> dict[str, Row]:
        """Return the rows by key, the last one of each.

        A line that is no complete row, as a killed process leaves them, is left out, and its job is to be done again.

        Raises:
            UserError: the file cannot be read.
        """
        if not self.path.exists():
            return {}
        rows = {}
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"rows cannot be read from {self.path}: {why}. Name another file with --results."
            ) from error
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                continue
            if _is_complete(row):
                rows[row["key"]] = row
        return rows

    @property
    def is_claimed(self) -> bool:
        """Whether a process works on a job, or was killed while it did."""
        return any(lock.name != _APPENDING for lock in self._locks.glob("*.lock"))

    def append(self, row: Row) -> None:
        """Add a row in one write, on a line of its own."""
        self._locks.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, sort_keys=True, allow_nan=False) + "\n"
        with FileLock(self._locks / _APPENDING), self.path.open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # somebody was killed while writing
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Claim a job for the time of the context.

        Yields:
            `bool`: Whether it is ours: no other process works on it, and it has no row yet.
        """
        self._locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._locks / f"{key}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield key not in self.read()
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)  # before the release: nobody can lock a file that is gone
            lock.release()


def _is_complete(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        return False
    numbers = all(isinstance(row.get(name), int | float) for name in _NUMBERS)
    return "error" in row or (numbers and isinstance(row.get("data"), str))
