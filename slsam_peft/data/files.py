"""Reads local JSON, JSON Lines and Parquet files row by row, with the line each row stands on.

The `datasets` library fills columns that a row lacks with nulls and names no line when a file is malformed, so files
are checked here before it reads them.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slsam_peft.data.rows import COLUMNS, RowError, kind_of, needed_columns, type_name
from slsam_peft.errors import UserError

SUFFIXES = (".json", ".jsonl", ".parquet")

_JSON_FORM = "a file holds one JSON object per line, or one list of objects"

Located = tuple[str, dict[str, Any]]  # ("line 3", row)


def check_file(path: Path, text_field: str = "text") -> str:
    """Check every row of a local data file and return their kind.

    Args:
        path (`Path`): A `.json`, `.jsonl` or `.parquet` file.
        text_field (`str`, *optional*, defaults to `"text"`): Name of the plain text column.

    Returns:
        `str`: The kind of all rows, see `kind_of`.

    Raises:
        UserError: the file is missing, of another type, unreadable, malformed or empty, a row lacks its columns, or
            rows are of different kinds. The message names the file and the line (the row, for Parquet).
    """
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; check the path, which is relative to {Path.cwd()}.")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"data file {path}: the extension '{path.suffix}' is not known; allowed: {', '.join(SUFFIXES)}. "
            "Convert the file, or rename it if it is one of these."
        )
    try:
        kind = _kind_of_all(path, text_field)
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror or error}.") from None
    if not kind:
        raise UserError(f"data file {path} is empty; it needs at least one row with {needed_columns(text_field)}.")
    return kind


def _kind_of_all(path: Path, text_field: str) -> str:
    """Return the kind of all rows of a file; empty where there is none."""
    kind = first = ""
    for where, row in _rows(path, text_field):
        try:
            found = kind_of(row, text_field)
        except RowError as error:
            raise UserError(f"{path}, {where}: {error.sentence}") from None
        if kind and found != kind:
            raise UserError(
                f"{path}, {where}: a {found} row, but {first} is a {kind} row; a file holds rows of one kind. "
                "Split the file, or bring all rows into one form."
            )
        kind, first = kind or found, first or where
    return kind


def _rows(path: Path, text_field: str) -> Iterator[Located]:
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path, text_field)
    return _json_list(path) if _starts_list(path) else _json_lines(path)


def _starts_list(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            text = line.removeprefix(codecs.BOM_UTF8).strip()
            if text:
                return text.startswith(b"[")
    return False


def _json_lines(path: Path) -> Iterator[Located]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = _decode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, path, number)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise _malformed(path, number, error) from None
            yield f"line {number}", _require_object(row, path, number)


def _json_list(path: Path) -> Iterator[Located]:
    """Yield the rows of a list one by one, so that each has its line."""
    text = _decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), path, 1)
    decoder = json.JSONDecoder()
    # Each turn reads one row and what separates it from the next; `counted` is how far newlines have been counted.
    at, line, counted = _skip_space(text, text.index("[") + 1), 1, 0
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _malformed(path, getattr(error, "lineno", line), error) from None
        yield f"line {line}", _require_object(row, path, line)
        at = _skip_space(text, at)
        if text.startswith(",", at):
            at = _skip_space(text, at + 1)
        elif not text.startswith("]", at):
            line += text.count("\n", counted, at)
            raise UserError(f"{path}, line {line}: not valid JSON: ',' or ']' expected after a row; {_JSON_FORM}.")
    rest = _skip_space(text, at + 1)
    if rest < len(text):
        line = 1 + text.count("\n", 0, rest)
        raise UserError(f"{path}, line {line}: not valid JSON: text after the end of the list; {_JSON_FORM}.")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); convert the file, for example by iconv."
        ) from None


def _malformed(path: Path, line: int, error: Exception) -> UserError:
    detail = "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        detail = f"{error.msg[:1].lower()}{error.msg[1:]} at column {error.colno}"
    return UserError(f"{path}, line {line}: not valid JSON: {detail}; {_JSON_FORM}.")


def _require_object(row: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {line}: a row must be a JSON object, not {type_name(row)}; {_JSON_FORM}.")
    return row


def _parquet_rows(path: Path, text_field: str) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # Only the columns that decide are read: a file may have other, large ones.
            read = [name for name in names if name in (*COLUMNS, text_field)] or names[:1]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=read):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", dict.fromkeys(names) | row
    except pa.ArrowException as error:
        detail = str(error).splitlines()[0]
        raise UserError(f"data file {path} cannot be read as Parquet: {detail}") from None
