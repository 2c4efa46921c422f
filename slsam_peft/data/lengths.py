"""Tells which rows have nothing left to learn once their sequences have been cut."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IGNORED = -100  # label of a position that is not scored


@dataclass(frozen=True)
class Lengths:
    """What it takes to keep the answers of some rows.

    Args:
        without (`int`): Rows that have no answer at all.
        first (`int`): Tokens with which one row more keeps a part of its answer; 0 where no row has one.
        begun (`int`): Tokens with which every row that has an answer keeps a part of it.
        whole (`int`): Tokens of the longest row.
    """

    without: int
    first: int
    begun: int
    whole: int


def needed(rows: Iterable[Mapping[str, Any]], max_length: int, *, from_end: bool = False) -> Lengths:
    """Return what it takes to keep answers that are cut off at `max_length`.

    Args:
        rows (`Iterable[dict]`): Whole sequences with `labels`, -100 where nothing is scored.
        max_length (`int`): Tokens that are kept.
        from_end (`bool`, *optional*, defaults to `False`): The last tokens are kept instead of the first.
    """
    lengths, without, whole = [], 0, 0
    for row in rows:
        labels: Sequence[int] = row["labels"][::-1] if from_end else row["labels"]
        whole = max(whole, len(labels))
        scored = next((i for i, label in enumerate(labels) if label != IGNORED), None)
        if scored is None:
            without += 1
        elif scored + 1 > max_length:
            lengths.append(scored + 1)
    return Lengths(without, min(lengths, default=0), max(lengths, default=0), whole)
