"""Names what settings take in the place of a name, functions and objects, by the values that they were made with."""

import inspect
from functools import partial
from typing import Any

PLAIN = str | int | float | None  # what is recorded as it is


def to_name(value: Any) -> str:
    """Name a function, the function of a partial, or the class of any other callable or object; keep a name."""
    if isinstance(value, str):
        return value
    value = value.func if isinstance(value, partial) else value
    value = value if hasattr(value, "__qualname__") else type(value)
    return f"{value.__module__}:{value.__qualname__}"


def described(value: Any) -> str:
    """Name a callable or an object as `to_name` does, with the plain values that it was made with.

    These are the arguments of a partial and, of an object, what it keeps under the names of its constructor's
    parameters: `"module:Sampa(sequences=None, fraction=None, share=0.2, extrapolate=True)"`.
    """
    if isinstance(value, partial):
        values = [("", x) for x in value.args] + [(f"{name}=", x) for name, x in value.keywords.items()]
    else:
        values = [(f"{name}=", x) for name, x in _made_with(value)]
    shown = [f"{name}{x!r}" for name, x in values if isinstance(x, PLAIN)]
    return to_name(value) + (f"({', '.join(shown)})" if shown else "")


def _made_with(value: Any) -> list[tuple[str, Any]]:
    """Return what an object, or that of a bound method, keeps under the names of its constructor's parameters."""
    owner = value.__self__ if inspect.ismethod(value) else value
    if hasattr(owner, "__qualname__"):  # a function or a class
        return []
    try:
        names = inspect.signature(type(owner)).parameters
    except ValueError:  # written in C
        return []
    return [(name, getattr(owner, name)) for name in names if hasattr(owner, name)]
