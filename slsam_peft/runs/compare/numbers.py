"""Numbers in the settings of a comparison: each is checked and made what it stands for."""

import math
from typing import Any


def at_least_one(name: str, value: Any) -> None:
    """Raise `ValueError` unless a value is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not allowed; it must be an integer >= 1.")


def all_positive(name: str, values: Any) -> tuple[float, ...]:
    """Return a list of different numbers > 0 as floats; `ValueError` where it is something else."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{name}={values!r} must be a list of one or more numbers.")
    numbers = tuple(positive(name, value) for value in values)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}={list(values)!r} has a number twice; each is one try.")
    return numbers


def positive(name: str, value: Any) -> float:
    """Return a finite number > 0 as a float, also where YAML took it for a text; `ValueError` otherwise."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML takes 1e-3 for a text, not 1.0e-3
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name}: {value!r} is not allowed; it must be a finite number > 0.")
    return number
