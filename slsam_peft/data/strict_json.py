"""Reads JSON as its standard has it: no NaN, and no key twice in one object, of which only the last would count."""

import json
from collections import Counter
from typing import Any


class DuplicateKeyError(ValueError):
    """An object has a key twice; the message says which one, without a place."""


def decoder() -> json.JSONDecoder:
    """Return a decoder that raises as `read_json` does."""
    return json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def read_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        DuplicateKeyError: an object in it has a key twice.
        ValueError: it is no JSON, or holds NaN or an infinity, which are none.
        RecursionError: it is nested too deeply.
    """
    return decoder().decode(text)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write null instead")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DuplicateKeyError(f"the key {twice!r} comes twice in one object, and only the last one would be read")
    return made


def reason_of(error: Exception) -> str:
    """Return why a text could not be read, as a phrase: what `read_json` raised, with its column where it has one."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]} at column {error.colno}"
    return str(error) if isinstance(error, ValueError) else "nested too deeply"
