"""Joins sequences of the next batch behind those of this one, for a look-ahead ascent."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from slsam_peft.trainer.cutting import CannotCutError, cut_documents, scored_items
from slsam_peft.trainer.documents import (
    BOUNDARIES,
    IGNORED,
    LONGEST,
    Documents,
    first_documents,
    flattened,
    holds_documents,
    read,
    shape_of,
)

# What fills up a row. A position id of 0 after another one makes the filler documents of their own, where any are.
FILLERS = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": IGNORED,
    "position_ids": 0,
    "token_type_ids": 0,
    "completion_mask": 0,
}
NUMBERS = "seq_idx"  # each token's document, counted from 0


class CannotJoinError(ValueError):
    """Sequences of two batches cannot share one. The message is a clause that says why, without a full stop."""


class Joined(NamedTuple):
    """A batch with sequences of the next one behind its own.

    Args:
        inputs (`dict`): The joined batch.
        own (`torch.Tensor`): Which of its tokens are this batch's own, its padding included: boolean, shape
            `(batch, length)` of the joined batch.
        tokens (`int`): Tokens of the riding sequences, padding not counted.
        riding_items (`torch.Tensor`): Scored positions of the riding tokens, shape `()`, not read by the host.
        riding (`dict`): A batch of the riding sequences alone.
        which (`torch.Tensor`): Which tokens of the next batch these are, boolean, of that batch's shape.
    """

    inputs: dict[str, Any]
    own: torch.Tensor
    tokens: int
    riding_items: torch.Tensor
    riding: dict[str, Any]
    which: torch.Tensor


def join(inputs: Mapping[str, Any], coming: Mapping[str, Any], wanted: int) -> Joined:
    """Put sequences of the next batch behind those of this one.

    Of padded rows those ride that lengthen this batch least, the earlier ones where several lengthen it as much.
    Of documents in a row the first ones ride: the shortest would lengthen it least in every step, and only they
    would ever be seen. The host reads a few numbers once.

    Args:
        inputs (`Mapping`): This batch.
        coming (`Mapping`): The next batch, with the same names, on the same device.
        wanted (`int`): How many of its sequences ride, at least 1; all where there are fewer.

    Raises:
        ValueError: `wanted` is below 1.
        CannotJoinError: the batches hold something that cannot be joined.
    """
    if wanted < 1:
        raise ValueError(f"wanted={wanted} must be at least 1: without a riding sequence there is nothing to join.")
    inputs = {name: value for name, value in inputs.items() if value is not None}
    coming = {name: value for name, value in coming.items() if value is not None}
    try:
        documents = holds_documents(inputs)
        if holds_documents(coming) != documents:
            raise CannotJoinError("one batch holds several documents in a row, and the next one does not")
        return (_join_documents if documents else _join_rows)(inputs, coming, wanted)
    except CannotCutError as error:
        raise CannotJoinError(str(error)) from error


def _join_rows(inputs: Mapping[str, Any], coming: Mapping[str, Any], wanted: int) -> Joined:
    """Return padded rows with some of the next batch's behind them."""
    for batch in (inputs, coming):
        _check_rows(batch)
    _check_same(inputs, coming)
    rows, longest, tokens = _that_lengthen_least(coming["attention_mask"], wanted, shape_of(inputs)[1])
    riding = {k: _picked(v, rows, longest) for k, v in coming.items()}
    joined = _below(inputs, riding)
    own = torch.zeros_like(joined["input_ids"], dtype=torch.bool)
    own[: len(inputs["input_ids"])] = True
    which = torch.zeros_like(coming["input_ids"], dtype=torch.bool)
    for row in rows:
        which[row] = True
    return Joined(joined, own, tokens, scored_items(riding), riding, which)


def _that_lengthen_least(mask: torch.Tensor, wanted: int, length: int) -> tuple[list[int], int, int]:
    """Return which rows lengthen a batch least, in order, their common length and their tokens."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    seen = mask != 0
    lengths, tokens = read((columns * seen).amax(1), seen.sum(1))
    chosen = sorted(sorted(range(len(mask)), key=lambda i: max(0, lengths[i] - length))[:wanted])
    return chosen, max(1, *(lengths[i] for i in chosen)), sum(tokens[i] for i in chosen)


def _check_rows(batch: Mapping[str, Any]) -> None:
    needed = ("input_ids", "attention_mask", "labels")
    shape = tuple(batch["input_ids"].shape) if isinstance(batch.get("input_ids"), torch.Tensor) else None
    wrong = [name for name in needed if not isinstance(batch.get(name), torch.Tensor)]
    for name, value in batch.items():
        fits = name in FILLERS and tuple(getattr(value, "shape", ())) == shape
        if not (fits or _is_setting(value)):
            wrong.append(name)
    _refuse(wrong, FILLERS)


def _check_same(inputs: Mapping[str, Any], coming: Mapping[str, Any]) -> None:
    """Refuse batches of different names, or with different settings; a setting may be in one of them alone."""
    both = {**coming, **inputs}
    names = [k for k, v in both.items() if (k not in inputs or k not in coming) and not _is_setting(v)]
    names += [k for k, v in inputs.items() if k not in LONGEST and _is_setting(v) and v != coming.get(k, v)]
    if names:
        raise CannotJoinError(f"{names[0]!r} is not the same in a batch and the next one")


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _picked(value: Any, entries: list[int], length: int) -> Any:
    """Return some entries of a value; of rows their first columns."""
    if _is_setting(value):
        return value
    picked = torch.cat([value[i : i + 1] for i in entries])  # a list of numbers would be sent to the device
    return picked[:, :length]


def _filled(value: torch.Tensor, length: int, filler: int) -> torch.Tensor:
    missing = length - value.shape[1]
    return F.pad(value, (0, missing), value=filler) if missing else value


def _join_documents(inputs: Mapping[str, Any], coming: Mapping[str, Any], wanted: int) -> Joined:
    """Return documents with the first ones of the next batch behind them: in the row, or as a row of their own."""
    for batch in (inputs, coming):
        _check_documents(batch)
    _check_same(inputs, coming)
    (numbers,) = read(first_documents(coming, wanted))
    documents = Documents(*numbers)
    riding = _one_row(cut_documents(coming, documents))
    rows, length = shape_of(inputs)
    apart = rows > 1 and BOUNDARIES[0] not in inputs
    own_part = dict(inputs) if apart else _one_row(inputs)
    joined = _below(own_part, riding) if apart else _behind(own_part, riding)
    own = torch.zeros_like(joined["input_ids"], dtype=torch.bool)
    own[:rows, :] = True
    if not apart:
        own[:, rows * length :] = False
    tokens = coming["input_ids"]
    which = (torch.arange(tokens.numel(), device=tokens.device) < documents.end).view(tokens.shape)
    return Joined(joined, own, documents.end, scored_items(riding), riding, which)


def _check_documents(batch: Mapping[str, Any]) -> None:
    shape = tuple(batch["input_ids"].shape) if isinstance(batch.get("input_ids"), torch.Tensor) else None
    wrong = [name for name in ("input_ids", "labels") if not isinstance(batch.get(name), torch.Tensor)]
    for name, value in batch.items():
        whole = name in FILLERS or name == NUMBERS
        fits = tuple(getattr(value, "shape", ())) == shape if whole else name in (*BOUNDARIES, *LONGEST)
        if not (fits or _is_setting(value)):
            wrong.append(name)
    _refuse(wrong, (*FILLERS, NUMBERS))


def _refuse(wrong: Sequence[str], known: Iterable[str]) -> None:
    if wrong:
        raise CannotJoinError(
            f"batches of {', '.join(known)}, each of shape (batch, length), can be joined; {wrong[0]!r} is missing "
            "or something else"
        )


def _one_row(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return documents in one row. What was a row's first label is nobody's target."""
    row = {k: flattened(inputs, v)[None] if k in FILLERS or k == NUMBERS else v for k, v in inputs.items()}
    row["labels"] = row["labels"].clone()
    row["labels"][:, :: shape_of(inputs)[1]] = IGNORED
    return row


def _behind(inputs: Mapping[str, Any], riding: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with another one behind it."""
    joined = {}
    for name, value in inputs.items():
        other: Any = riding.get(name)
        if _is_setting(value) and name not in LONGEST:
            joined[name] = value
        elif name in BOUNDARIES:
            joined[name] = torch.cat([value, value[-1] + other[1:]])
        elif name in LONGEST:
            tensors = isinstance(value, torch.Tensor)
            joined[name] = torch.maximum(value, other) if tensors else max(value, other)
        elif name == NUMBERS:
            joined[name] = torch.cat([value, value[:, -1:] + 1 + other - other[:, :1]], dim=1)
        else:
            joined[name] = torch.cat([value, other], dim=1)
    return joined


def _below(inputs: Mapping[str, Any], riding: Mapping[str, Any]) -> dict[str, Any]:
    """Return rows with another one below them, all of one length."""
    length = max(shape_of(inputs)[1], shape_of(riding)[1])
    fillers = {**FILLERS, NUMBERS: -1}
    return {
        k: v
        if _is_setting(v) or k not in fillers
        else torch.cat([_filled(x, length, fillers[k]) for x in (v, riding[k])])
        for k, v in inputs.items()
    }
