"""Counts the rows of which nothing is left to learn within the sequence length, and says which length would do."""

import logging
from collections.abc import Iterator
from typing import Any

import torch

from slsam_peft.data.lengths import IGNORED, needed

logger = logging.getLogger(__name__)

_BATCH = 1024


def check_answers(whole: Any, args: Any, name: str, *, packing: bool = False) -> None:
    """Count rows that have nothing to learn within `max_length`, and say so.

    Every label is looked at once, in the columns as they are stored; those that are lost once more.

    Args:
        whole (`Dataset`): Whole sequences with `labels`, -100 where nothing is scored.
        args (`SFTConfig`): Read: `max_length`, `truncation_mode`.
        name (`str`): `"train"`, or the name of the held-out rows.
        packing (`bool`, *optional*, defaults to `False`): Whether rows are packed, so that such rows stay in.

    Raises:
        ValueError: all of them have nothing; the message names the length that would do.
    """
    from_end = args.truncation_mode == "keep_end"
    lost, longest = _lost(whole, args.max_length, from_end)
    if not lost:
        return
    found = needed(whole.select(lost).select_columns(["labels"]), args.max_length, from_end=from_end)
    which = "training" if name == "train" else "held-out"
    if not found.first:
        what, do = "have no answer (a completion that its chat template leaves out)", ""
    else:
        what = f"have no answer within max_length={args.max_length}"
        do = f"; an answer begins in each with max_length={found.begun}, and all are whole with max_length={longest}"
    if len(lost) == len(whole):
        raise ValueError(f"all {len(whole)} {which} rows {what}{do}.")
    then = "teach nothing" if packing else "are left out"
    logger.warning("%d of %d %s rows %s and %s%s.", len(lost), len(whole), which, what, then, do)


def _lost(whole: Any, max_length: int, from_end: bool) -> tuple[list[int], int]:
    """Return which rows have no scored label within the length, and the length of the longest row."""
    lost: list[int] = []
    first, longest = 0, 0
    for labels, lengths in _labels(whole):
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        place = torch.arange(len(labels)) - (lengths.cumsum(0) - lengths)[row]
        kept = place >= lengths[row] - max_length if from_end else place < max_length
        scored = torch.bincount(row[kept & (labels != IGNORED)], minlength=len(lengths))
        lost += (first + (scored == 0).nonzero().flatten()).tolist()
        first, longest = first + len(lengths), max(longest, int(lengths.max()))
    return lost, longest


def _labels(whole: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the labels of some rows, one behind another, and the rows' lengths."""
    for batch in whole.select_columns(["labels"]).with_format("arrow").iter(_BATCH):
        column = batch["labels"].combine_chunks()
        ends = torch.tensor(column.offsets.to_numpy())
        yield torch.tensor(column.flatten().to_numpy(zero_copy_only=False)), ends.diff().long()
