"""Checks names against those that are allowed, and offers the nearest one where a name is misspelt."""

import difflib
from collections.abc import Iterable
from typing import Any

# How alike two names must be for one to be offered in place of the other, as difflib measures it: misspellings of
# short names ("roh" for rho) come to 0.67, names that have little in common ("lr" and rho) to 0.4.
NEAR = 0.6


def check_name(
    what: str, value: Any, allowed: tuple[str, ...], callable_too: bool = False, method: str | None = None
) -> None:
    """Raise `ValueError` naming the nearest match unless `value` is one of `allowed`.

    Args:
        what (`str`): The setting, for the message.
        value (`Any`): Its value.
        allowed (`tuple[str, ...]`): The names there are.
        callable_too (`bool`, *optional*, defaults to `False`): Whether a callable will do.
        method (`str`, *optional*): An object with a method of this name will do.
    """
    if isinstance(value, str) and value in allowed:
        return
    if (callable_too and callable(value)) or (method and callable(getattr(value, method, None))):
        return
    choices = ", ".join(f"'{name}'" for name in allowed) + (" or a callable" if callable_too else "")
    raise ValueError(f"{what}={value!r} is not known; allowed: {choices}.{hint_at(value, allowed)}")


def hint_at(value: Any, allowed: Iterable[str]) -> str:
    """Return the nearest of the allowed names as a question to end a message with; empty where none is near.

    Neither letter case nor the dashes in front of a flag count: "--lr" and "--rho" have two characters in common that
    say nothing.
    """
    if not isinstance(value, str) or value in (allowed := tuple(allowed)):
        return ""
    names = {name.lstrip("-").lower(): name for name in allowed}
    near = difflib.get_close_matches(value.lstrip("-").lower(), names, n=1, cutoff=NEAR)
    return f" Did you mean '{names[near[0]]}'?" if near else ""
