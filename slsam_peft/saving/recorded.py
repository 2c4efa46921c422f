"""Reads `slsam.json` beside an adapter, and refuses one that does not hold what `write_record` writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slsam_peft.algorithm.fallbacks import Fallback
from slsam_peft.config import RECORD_NAME, RECORD_SCHEMA
from slsam_peft.errors import UserError
from slsam_peft.saving.record import (
    PROBE_POSITIONS,
    PROBE_VALUES,
    SAMPLED_VALUES,
    SHAPE_FIELDS,
    Record,
)


def read_record(folder: Path) -> Record | None:
    """Return the record of the adapter in `folder`, or `None` where there is none.

    One of an adapter with a name may lie a folder above, if no other adapter lies there or beside it.

    Raises:
        UserError: it cannot be read, another version wrote it, or a value is missing or of another kind than is
            written. The message names the file, the value's place in it, and what to do.
    """
    path = folder / RECORD_NAME
    if not path.is_file() and _is_alone(folder):
        path = folder.parent / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        schema = _get(record, "schema", lambda value: type(value) is int, "an integer")
        if schema == RECORD_SCHEMA:
            _check(record)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Copy it again from where the adapter was trained, or delete it: the "
            "adapter then counts as one of another trainer."
        ) from error
    if schema != RECORD_SCHEMA:
        raise UserError(
            f"{path} has schema {schema!r}; this version reads schema {RECORD_SCHEMA}. Use the version of slsam-peft "
            "that wrote it, or delete the file: the adapter then counts as one of another trainer."
        )
    return record


def recorded_fallbacks(folder: str | Path) -> list[Fallback]:
    """Return what training fell back to, by the record in a folder; nothing where none can be read."""
    try:
        record = read_record(Path(folder))
    except UserError:
        return []
    return fallbacks_in(record)


def fallbacks_in(record: Record | None) -> list[Fallback]:
    """Return what training fell back to, by a record; nothing where an earlier version wrote it, which did not say."""
    return [Fallback(**entry) for entry in (record or {}).get("fallbacks", [])]


def _is_alone(folder: Path) -> bool:
    """Return whether a folder's adapter is the only one that a record a folder above can be of."""
    above = folder.resolve().parent
    return (
        list(above.glob("*/adapter_config.json")) == [folder.resolve() / "adapter_config.json"]
        and not (above / "adapter_config.json").exists()
    )


def _check(record: Any) -> None:
    """Raise `ValueError` naming the first value that is missing or of another kind."""
    for name in ("method", "training", "versions"):
        _entries(record, name, _is_scalar, "a plain value")
    _get(record, "training.steps", lambda v: type(v) is int, "an integer")
    _get(record, "training.learning_rate", lambda v: v is None or _is_number(v), "a number")
    _get(record, "base.name", lambda v: v is None or isinstance(v, str), "a text")
    _get(record, "base.dtype", _is_dtype, "the name of a floating dtype of torch")
    _get(record, "base.shape", _is_shape, f"a mapping of some of {', '.join(SHAPE_FIELDS)} to their values")
    quantization = _get(record, "base.quantization", lambda v: v is None or isinstance(v, dict), "a mapping or null")
    names = _get(record, "base.unquantized", lambda v: v is None or _is_list(v, str), "a list of texts, or null")
    if quantization is not None and names is None:
        raise ValueError("base.unquantized is null; for a quantised base it must be a list of texts")
    _entries(record, "base.values", _are_samples, f"a list of {SAMPLED_VALUES} numbers")
    if "fallbacks" in record:  # records of earlier versions have none
        _get(record, "fallbacks", _are_fallbacks, f"a list of mappings of {', '.join(Fallback._fields)} to texts")
    _get(
        record,
        "probe",
        lambda v: v is None or (isinstance(v, list) and len(v) == PROBE_POSITIONS and all(map(_is_row, v))),
        f"null, or {PROBE_POSITIONS} lists of {PROBE_VALUES} numbers",
    )


def _get(record: Any, place: str, allowed: Callable[[Any], bool], what: str) -> Any:
    """Return the value at a dotted place.

    Raises:
        ValueError: it is missing, or not allowed.
    """
    value, passed = record, []
    for key in place.split("."):
        if not isinstance(value, dict):
            raise ValueError(f"{'.'.join(passed) or 'the file'} must be a mapping")
        passed.append(key)
        if key not in value:
            raise ValueError(f"{'.'.join(passed)} is missing")
        value = value[key]
    _require(value, place, allowed, what)
    return value


def _entries(record: Any, place: str, allowed: Callable[[Any], bool], what: str) -> None:
    """Check every value of the mapping at a place, as `_get` does."""
    for name, value in _get(record, place, lambda v: isinstance(v, dict), "a mapping").items():
        _require(value, f"{place}.{name}", allowed, what)


def _require(value: Any, place: str, allowed: Callable[[Any], bool], what: str) -> None:
    if not allowed(value):
        shown = repr(value)
        raise ValueError(f"{place} is {shown[:60]}{'...' * (len(shown) > 60)}; it must be {what}")


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _is_dtype(value: Any) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_shape(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= set(SHAPE_FIELDS)  # some models have a list of sizes


def _are_samples(value: Any) -> bool:
    """Whether these are the values sampled of a tensor; an empty one has none."""
    return isinstance(value, list) and len(value) in (0, SAMPLED_VALUES) and all(map(_is_number, value))


def _are_fallbacks(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and entry.keys() == set(Fallback._fields)
        and all(isinstance(text, str) for text in entry.values())
        for entry in value
    )


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == PROBE_VALUES
        and all(entry is None or _is_number(entry) for entry in value)
    )
