"""A comparison's settings are read from a YAML file here. This module imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from slsam_peft.errors import UserError, brief
from slsam_peft.names import check_name
from slsam_peft.runs.compare.methods import MethodSettings
from slsam_peft.runs.compare.settings import CompareSettings, TaskSettings, TrainingSettings

_KINDS = {str: "a text", bool: "true or false", Mapping: "a mapping of names to values"}


def read_settings(path: Path) -> CompareSettings:
    """Read a comparison from a YAML file.

    Raises:
        UserError: the file cannot be read, or a setting is missing, unknown (with the nearest match) or not allowed.
            The message names the file and the place in it.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not valid YAML: {brief(error, 300)}") from error
    try:
        return parse_settings(values)
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from error


def parse_settings(values: Any) -> CompareSettings:
    """Build a comparison from plain values; see `read_settings`."""
    top = dict(_mapping("the file", values))
    try:
        json.dumps(values, default=_refused)  # rows are JSON
    except ValueError as error:  # a YAML alias can lead back to where it stands
        raise UserError("a value contains itself; an alias (*) must not lead back to its anchor (&).") from error
    for name, cls in (("tasks", TaskSettings), ("methods", MethodSettings)):
        if name in top:
            entries = _mapping(name, top[name])
            if not entries:
                raise UserError(f"{name} is empty; it needs at least one entry.")
            if len(set(map(str, entries))) < len(entries):
                raise UserError(f"{name}: two entries have the same name; they are {', '.join(map(repr, entries))}.")
            top[name] = {str(key): _build(cls, f"{name}.{key}", value) for key, value in entries.items()}
    if "training" in top:
        top["training"] = _build(TrainingSettings, "training", top["training"])
    for name in ("seeds", "match"):
        if name in top:
            value = top[name]
            top[name] = tuple(value) if isinstance(value, list | tuple) else (value,)
    return _build(CompareSettings, "", top)


def _build(cls: type, where: str, values: Any) -> Any:
    prefix = f"{where}." if where else ""
    values = _mapping(where or "the file", values)
    try:
        for key in values:
            check_name(f"{where} setting".strip(), key, tuple(f.name for f in fields(cls)))
    except ValueError as error:
        raise UserError(str(error)) from error
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is missing.")
    for setting in fields(cls):
        if setting.name in values:
            _check_kind(f"{prefix}{setting.name}", values[setting.name], setting.type)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{prefix}{error}") from error


def _check_kind(where: str, value: Any, declared: Any) -> None:
    """Refuse what is no text, switch or mapping where the annotation asks for one; numbers are checked elsewhere."""
    kinds = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    kinds = tuple(get_origin(kind) or kind for kind in kinds)
    for kind, name in _KINDS.items():
        if kind in kinds and not isinstance(value, kinds):
            raise UserError(f"{where}={value!r} is not allowed; it must be {name}.")


def _refused(value: Any) -> Any:
    raise UserError(f"{value!r} is not allowed; values are texts (quote dates), numbers, true, false or lists.")


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping of names to values, not {value!r}.")
    return value
