"""Reads local JSON, JSON Lines and Parquet files row by row, with the line each row stands on.

The `datasets` library fills columns that a row lacks with nulls, guesses their types from the first rows and names no
line when a file is malformed. So files are checked here, and those of JSON are read here alone.
"""

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slsam_peft.data.columns import Columns, widened
from slsam_peft.data.emptiness import Emptiness
from slsam_peft.data.rows import RowError, needed_columns, type_name
from slsam_peft.data.spellings import Converter, Row, deciding_columns
from slsam_peft.data.strict_json import DuplicateKeyError, decoder, read_json, reason_of
from slsam_peft.errors import UserError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (".json", ".jsonl", ".parquet", ".ndjson")
ALLOWED = f"{', '.join(SUFFIXES)}, and JSON packed by gzip, .jsonl.gz"

_JSON_FORM = "a file holds one JSON object per line, or one list of objects"

Located = tuple[str, Row]  # ("line 3", row)


@dataclass(frozen=True)
class Table:
    """What is known of the rows of some files once all of them have been read.

    Args:
        kind (`str`): Their kind, see `kind_of`.
        columns (`dict[str, Kind]`): Their columns as they are trained on; empty for Parquet, which has its own.
        said (`list[str]`): What was converted or left out, as sentences.
        empty (`list[str]`): How many rows have nothing to answer, as sentences.
    """

    kind: str
    columns: Columns
    said: list[str]
    empty: list[str]


def suffix_of(path: Path) -> str:
    """Return what a data file's name says that it is: one of `SUFFIXES`, or an empty text."""
    name = path.name.lower()
    packed = name.removesuffix(".gz")
    suffix = Path(packed).suffix
    if suffix not in SUFFIXES or (packed != name and suffix not in JSON_SUFFIXES):
        return ""
    return suffix


def check_file(path: Path, text_field: str = "text") -> str:
    """Check every row of a local data file and return their kind.

    Args:
        path (`Path`): A `.json`, `.jsonl`, `.ndjson` or `.parquet` file; those of JSON may be packed by gzip.
        text_field (`str`, *optional*, defaults to `"text"`): Name of the plain text column.

    Returns:
        `str`: The kind of all rows, see `kind_of`.

    Raises:
        UserError: the file is missing, of another type, unreadable, malformed or empty, a row lacks its columns, rows
            are of different kinds, or the answers of all rows are empty. The message names the file and the line (the
            row, for Parquet).
    """
    return check_files([path], text_field).kind


def check_files(paths: Sequence[Path], text_field: str = "text") -> Table:
    """Check every row of local data files, which must all be of one kind; see `check_file`."""
    for path in paths:
        _check_name(path)
    convert = Converter(text_field)
    found = check_rows(_located(paths, text_field), convert, typed=suffix_of(paths[0]) == ".parquet")
    if not found.kind:
        which = f"data file {paths[0]} is" if len(paths) == 1 else f"data files {', '.join(map(str, paths[:3]))} are"
        raise UserError(f"{which} empty; at least one row with {needed_columns(text_field)} is needed.")
    return found


def check_rows(rows: Iterable[Located], convert: Converter, *, typed: bool, sample: bool = False) -> Table:
    """Check rows, which must all be of one kind.

    Args:
        rows (`Iterable[tuple[str, dict]]`): Where each row is, and the row.
        convert (`Converter`): Turns rows into what is trained on.
        typed (`bool`): The rows come from a table, whose columns have types of their own.
        sample (`bool`, *optional*, defaults to `False`): There are other rows, so that empty answers are not counted.

    Raises:
        UserError: a row is none, is of another kind than the first, or cannot be stored, or the answers of all rows
            are empty. The message says where it is.
    """
    kind = first = ""
    columns: Columns = {}
    answers = Emptiness(convert.text_field)
    for where, row in rows:
        try:
            found, made = convert(row)
            if not typed:
                columns = widened(columns, made)
        except RowError as error:
            raise UserError(f"{where}: {error.sentence}") from None
        if kind and found != kind:
            raise UserError(
                f"{where}: a {found} row, but {_seen_from(where, first)} is a {kind} row; all rows must be of one "
                "kind. Split the data, or bring all rows into one form."
            )
        kind, first = kind or found, first or where
        answers.add(where, found, made)
    if sample:
        return Table(kind, columns, convert.sentences(), [])
    answers.check()
    return Table(kind, columns, convert.sentences(), answers.sentences())


def _seen_from(here: str, place: str) -> str:
    """Return a place as it is named beside another one: without the file's name where that is the same."""
    file, _, line = place.rpartition(", ")
    return line if file == here.rpartition(", ")[0] else place


def _check_name(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; check the path, which is relative to {Path.cwd()}.")
    if not suffix_of(path):
        raise UserError(
            f"data file {path}: the extension '{path.suffix}' is not known; allowed: {ALLOWED}. "
            "Convert the file, or rename it if it is one of these."
        )


def _located(paths: Sequence[Path], text_field: str) -> Iterator[Located]:
    for path in paths:
        try:
            for where, row in read_rows(path, text_field):
                yield f"{path}, {where}", row
        except (OSError, EOFError, zlib.error) as error:
            what = getattr(error, "strerror", None) or error
            raise UserError(f"data file {path} cannot be read: {what}.") from None


def read_rows(path: Path, text_field: str = "text") -> Iterator[Located]:
    """Yield the rows of a file as they stand there, with their places; of Parquet, only columns that decide.

    Raises:
        UserError: it is malformed. The message names the file and the line.
        OSError, EOFError, zlib.error: it cannot be read.
    """
    if suffix_of(path) == ".parquet":
        return _parquet_rows(path, text_field)
    return _json_list(path) if _starts_list(path) else _json_lines(path)


def _open(path: Path) -> IO[bytes]:
    opened: Any = gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")
    return opened


def _starts_list(path: Path) -> bool:
    with _open(path) as file:
        for line in file:
            text = line.removeprefix(codecs.BOM_UTF8).strip()
            if text:
                return text.startswith(b"[")
    return False


def _json_lines(path: Path) -> Iterator[Located]:
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            text = _decode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, path, number)
            if not text.strip():
                continue
            try:
                row = read_json(text)
            except (ValueError, RecursionError) as error:
                raise _malformed(path, number, error) from None
            yield f"line {number}", _require_object(row, path, number)


def _json_list(path: Path) -> Iterator[Located]:
    """Yield the rows of a list one by one, so that each has its line."""
    with _open(path) as file:
        text = _decode(file.read().removeprefix(codecs.BOM_UTF8), path, 1)
    reader = decoder()
    # Each turn reads one row and what separates it from the next; `counted` is how far newlines have been counted.
    at, line, counted = _skip_space(text, text.index("[") + 1), 1, 0
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = reader.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
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
    if isinstance(error, DuplicateKeyError):
        return UserError(f"{path}, line {line}: {error}; leave one out.")
    return UserError(f"{path}, line {line}: not valid JSON: {reason_of(error)}; {_JSON_FORM}.")


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
            read = [name for name in names if name in deciding_columns(text_field)] or names[:1]
            decode = _decoder_of(file.schema_arrow, read)
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=read):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", dict.fromkeys(names) | decode(row)
    except pa.ArrowException as error:
        detail = str(error).splitlines()[0]
        raise UserError(f"data file {path} cannot be read as Parquet: {detail}") from None


def _decoder_of(schema: Any, names: Sequence[str]) -> Callable[[Row], Row]:
    """Return what makes a row of some columns as `datasets` reads them, which stores values of many types as JSON."""
    if b'"Json"' not in (schema.metadata or {}).get(b"huggingface", b""):
        return lambda row: row
    from datasets import Features

    declared = Features.from_arrow_schema(schema)
    return Features({name: declared[name] for name in names}).decode_example
