"""Tells how rows are stored in a table so that they come back unchanged.

A column of a table has one type. `datasets` stores values of several types as JSON texts, takes a text that is JSON
for one it has stored itself, and gives back the number 7 for the text "007"; it also decides after the first rows of
a file. Here the types are those of all rows, and what has several is turned into JSON texts before `datasets` sees it.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slsam_peft.data.rows import TEMPLATE_OPTIONS, RowError

if TYPE_CHECKING:
    from datasets import Features

# "null", a JSON type's name, ("list", Kind), ("dict", ((key, Kind), ...)), or "json" for what has several types.
Kind = str | tuple[str, Any]
Columns = dict[str, Kind]

NULL, JSON, LIST, DICT = "null", "json", "list", "dict"
_SCALARS = {bool: "bool", int: "int64", float: "float64", str: "string"}
_LARGEST = 2**63  # integers of a column are below, and not below its negative


def widened(columns: Columns, row: Mapping[str, Any]) -> Columns:
    """Return the columns of some rows and one more.

    Args:
        columns (`dict[str, Kind]`): The columns of the rows so far.
        row (`Mapping[str, Any]`): The next one, of JSON values.

    Raises:
        RowError: a value cannot be stored: a half of a surrogate pair, NaN among other types, too large an integer.
    """
    made = dict(columns)
    for name, value in row.items():
        try:
            kind = kind_of_value(value)
        except ValueError as error:
            raise RowError(f"'{name}' {error}") from None
        made[name] = merged(made.get(name, NULL), kind)
        if name == TEMPLATE_OPTIONS:  # keys that a row lacks are no keys with null
            made[name] = JSON
    return made


def kind_of_value(value: Any) -> Kind:
    """Return the type of a JSON value.

    Raises:
        ValueError: it cannot be stored.
    """
    if value is None:
        return NULL
    if isinstance(value, list):
        inner: Kind = NULL
        for entry in value:
            inner = merged(inner, kind_of_value(entry))
        return (LIST, inner)
    if isinstance(value, dict):
        parts = tuple(sorted((_checked_text(key), kind_of_value(part)) for key, part in value.items()))
        return (DICT, parts) if parts else JSON
    if isinstance(value, str):
        _checked_text(value)
    if type(value) is int and not -_LARGEST <= value < _LARGEST:
        if not 0 <= value < 2 * _LARGEST:
            raise ValueError(f"holds {value}, an integer of more than 64 bits; write it as a text")
        return JSON
    return _SCALARS[type(value)]


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds \\u{ord(text[error.start]):04x} alone, a half of a character that no text can be written with; "
            "take it out, or write the character whole"
        ) from None
    return text


def merged(first: Kind, second: Kind) -> Kind:
    """Return the type that holds values of both types."""
    if first == second or second == NULL:
        return first
    if first == NULL:
        return second
    if first[0] == second[0] == LIST:
        return (LIST, merged(first[1], second[1]))
    if first[0] == second[0] == DICT and [key for key, _ in first[1]] == [key for key, _ in second[1]]:
        pairs = zip(first[1], second[1], strict=True)
        return (DICT, tuple((key, merged(kind, other)) for (key, kind), (_, other) in pairs))
    return JSON


def features(columns: Columns) -> "Features":
    """Return the columns as `datasets` declares them."""
    from datasets import Features

    return Features({name: _feature(kind) for name, kind in columns.items()})


def _feature(kind: Kind) -> Any:
    from datasets import Json, List, Value

    if kind == JSON:
        return Json()
    if isinstance(kind, str):
        return Value(kind)
    if kind[0] == LIST:
        return List(_feature(kind[1]))
    return {key: _feature(part) for key, part in kind[1]}


def stored(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Return a row as `datasets` is to be given it: with every column, and JSON texts where a type is `"json"`."""
    made = {name: _stored(row.get(name), kind) for name, kind in columns.items()}
    if TEMPLATE_OPTIONS in columns and made[TEMPLATE_OPTIONS] is None:
        made[TEMPLATE_OPTIONS] = "{}"  # TRL unpacks it
    return made


def _stored(value: Any, kind: Kind) -> Any:
    if value is None:
        return None
    if kind == JSON:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(kind, str):
        return value
    if kind[0] == LIST:
        return [_stored(entry, kind[1]) for entry in value]
    return {key: _stored(value[key], part) for key, part in kind[1]}
