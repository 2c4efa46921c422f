"""Tells where a row of a loaded data set stands: its file and line, or its data set and number.

A `Dataset` knows nothing of files. What is known when it is loaded is kept beside it for as long as it lives; one that
is made out of it later has numbers alone.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from slsam_peft.data.files import read_rows

Place = Callable[[int], str]  # of a row's number, from 1

_places: "weakref.WeakKeyDictionary[Any, Place]" = weakref.WeakKeyDictionary()


def remember(data: Any, place: Place) -> Any:
    """Keep where the rows of a data set stand, and return it."""
    _places[data] = place
    return data


def place_of(data: Any, number: int) -> str:
    """Return where a row stands, as a phrase for errors: `"row 3"` where nothing else is known.

    Args:
        data (`Dataset` or `IterableDataset`): The data set.
        number (`int`): The row's number in it, from 1.
    """
    place = _places.get(data)
    return place(number) if place is not None else f"row {number}"


def in_files(files: Sequence[Path], text_field: str) -> Place:
    """Return the places of the rows of files, which are read again for each of them."""

    def place(number: int) -> str:
        located = (f"{file}, {where}" for file in files for where, _ in read_rows(file, text_field))
        return next(islice(located, number - 1, None), f"{files[0]}, row {number}")

    return place


def in_parts(parts: Sequence[tuple[Any, int, int]]) -> Place:
    """Return the places of the rows of several parts, one after the other.

    Args:
        parts (`Sequence`): Of each, the data set that it is of, and its first row, from 0, and the one after its last.
    """

    def place(number: int) -> str:
        for data, start, stop in parts:
            if number <= stop - start:
                return place_of(data, start + number)
            number -= stop - start
        return f"row {number}"

    return place
