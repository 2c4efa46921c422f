"""Joins sequences of the next batch behind those of this one, for a look-ahead ascent."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from slsam_peft.trainer.cutting import CannotCutError, count_sequences, cut_documents, scored_items
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
OF_PAIRS = ("ref_chosen_logps", "ref_rejected_logps", "margin")  # shape (pairs,), of TRL's preference trainers
NUMBERS = "seq_idx"  # each token's document, counted from 0


class CannotJoinError(ValueError):
    """Sequences of two batches cannot share one. The message is a clause that says why, without a full stop."""


class Joined(NamedTuple):
    """A batch with sequences of the next one behind its own.

    Args:
        inputs (`dict`): The joined batch.
        own (`torch.Tensor`): Which of its tokens are this batch's own, its padding included: boolean, shape
            `(batch, length)` of the joined batch.
        sequences (`tuple[int, int]`): How many sequences (pairs where two rows are one) come from each batch.
        tokens (`int`): Tokens of the riding sequences, padding not counted.
        own_items (`torch.Tensor`): Scored positions of own tokens, shape `()`, not read by the host; pairs where the
            batch has no labels, as DPO's and the reward trainer's.
        riding_items (`torch.Tensor`): The same of the riding tokens.
        riding (`dict`): A batch of the riding sequences alone; empty where none ride.
        which (`torch.Tensor`): Which tokens of the next batch these are, boolean, of that batch's shape.
    """

    inputs: dict[str, Any]
    own: torch.Tensor
    sequences: tuple[int, int]
    tokens: int
    own_items: torch.Tensor
    riding_items: torch.Tensor
    riding: dict[str, Any]
    which: torch.Tensor


def join(
    inputs: Mapping[str, Any],
    coming: Mapping[str, Any] | None,
    wanted: int,
    stacked: int = 1,
    padding: int | None = None,
) -> Joined:
    """Put sequences of the next batch behind those of this one.

    Of padded rows those ride that lengthen this batch least, the earlier ones where several lengthen it as much.
    Of documents in a row the first ones ride: the shortest would lengthen it least in every step, and only they
    would ever be seen. The host reads a few numbers once.

    Args:
        inputs (`Mapping`): This batch.
        coming (`Mapping` or `None`): The next batch, with the same names, on the same device; `None` where there is
            none.
        wanted (`int`): How many of its sequences ride (pairs where `stacked` is 2), at least 1; all where there are
            fewer.
        stacked (`int`, *optional*, defaults to `1`): Rows per example: TRL puts chosen rows above rejected ones.
            Riding pairs are put behind the own ones inside both halves.
        padding (`int`, *optional*): Token to fill rows up with. Reward models look for it to find a row's end; to
            others it is a token that nobody sees, and 0 will do.

    Raises:
        ValueError: `wanted` is below 1.
        CannotJoinError: the batches hold something that cannot be joined.
    """
    if wanted < 1:
        raise ValueError(f"wanted={wanted} must be at least 1: without a riding sequence there is nothing to join.")
    inputs = {name: value for name, value in inputs.items() if value is not None}
    try:
        if coming is None:
            return _alone(inputs, stacked)
        coming = {name: value for name, value in coming.items() if value is not None}
        documents = holds_documents(inputs)
        if holds_documents(coming) != documents:
            raise CannotJoinError("one batch holds several documents in a row, and the next one does not")
        if documents and stacked > 1:
            raise CannotJoinError("rows of several documents are not pairs")
        if documents:
            return _join_documents(inputs, coming, wanted)
        return _join_rows(inputs, coming, wanted, stacked, padding)
    except CannotCutError as error:
        raise CannotJoinError(str(error)) from error


def _alone(inputs: Mapping[str, Any], stacked: int) -> Joined:
    """Return a batch with nothing behind it."""
    tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if tokens is None:
        raise CannotJoinError("it holds no tokens")
    examples = count_sequences(inputs, stacked)
    own = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    items = _items(inputs, examples)
    return Joined(dict(inputs), own, (examples, 0), 0, items, torch.zeros_like(items), {}, ~own)


def _join_rows(
    inputs: Mapping[str, Any], coming: Mapping[str, Any], wanted: int, stacked: int, padding: int | None
) -> Joined:
    """Return padded rows with some of the next batch's behind them, in each of `stacked` parts."""
    for batch in (inputs, coming):
        _check_rows(batch, stacked, padding)
    _check_same(inputs, coming)
    examples, others = count_sequences(inputs, stacked), count_sequences(coming, stacked)
    chosen, longest, tokens = _that_lengthen_least(coming["attention_mask"], others, wanted, shape_of(inputs)[1])
    rows = [part * others + i for part in range(stacked) for i in chosen]
    fillers = {**FILLERS, "input_ids": padding or 0}
    riding = {k: _picked(v, chosen if k in OF_PAIRS else rows, longest) for k, v in coming.items()}
    length = max(shape_of(inputs)[1], longest)
    joined = {}
    for name, value in inputs.items():
        if name in FILLERS and not _is_setting(value):
            pair = _filled(value, length, fillers[name]), _filled(riding[name], length, fillers[name])
            joined[name] = _interleaved(*pair, stacked)
        else:
            joined[name] = torch.cat([value, riding[name]]) if name in OF_PAIRS else value
    masks = [inputs["input_ids"].new_full((len(x["input_ids"]), length), x is inputs) for x in (inputs, riding)]
    own = _interleaved(masks[0], masks[1], stacked).bool()
    items = _items(inputs, examples), _items(riding, len(chosen))
    which = torch.zeros_like(coming["input_ids"], dtype=torch.bool)
    for row in rows:
        which[row] = True
    return Joined(joined, own, (examples, len(chosen)), tokens, *items, riding, which)


def _that_lengthen_least(mask: torch.Tensor, examples: int, wanted: int, length: int) -> tuple[list[int], int, int]:
    """Return which examples lengthen a batch least, in order, their common length and their tokens."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    seen = (mask != 0).view(-1, examples, mask.shape[1])
    lengths, tokens = read((columns * seen).amax((0, 2)), seen.sum((0, 2)))
    chosen = sorted(sorted(range(examples), key=lambda i: max(0, lengths[i] - length))[:wanted])
    return chosen, max(1, *(lengths[i] for i in chosen)), sum(tokens[i] for i in chosen)


def _check_rows(batch: Mapping[str, Any], stacked: int, padding: int | None) -> None:
    shape = tuple(batch["input_ids"].shape) if isinstance(batch.get("input_ids"), torch.Tensor) else None
    wrong = [name for name in ("input_ids", "attention_mask") if not isinstance(batch.get(name), torch.Tensor)]
    for name, value in batch.items():
        known = shape if name in FILLERS else (shape[0] // stacked,) if shape and name in OF_PAIRS else None
        if not _is_setting(value) and (known is None or tuple(getattr(value, "shape", ())) != known):
            wrong.append(name)
    if wrong:
        raise CannotJoinError(
            f"batches of {', '.join(FILLERS)}, each of shape (batch, length), can be joined; {wrong[0]!r} is missing "
            "or something else"
        )
    if padding is None and "labels" not in batch and "completion_mask" not in batch:
        raise CannotJoinError(
            "a model that scores a row by its last token finds it by the padding token, and none is known"
        )


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
    return picked[:, :length] if picked.dim() > 1 else picked


def _filled(value: torch.Tensor, length: int, filler: int) -> torch.Tensor:
    missing = length - value.shape[1]
    return F.pad(value, (0, missing), value=filler) if missing else value


def _interleaved(first: torch.Tensor, second: torch.Tensor, parts: int) -> torch.Tensor:
    """Return the rows of two tensors one behind the other, in each of several equal parts."""
    pairs = zip(first.chunk(parts), second.chunk(parts), strict=True)
    return torch.cat([x for pair in pairs for x in pair])


def _items(inputs: Mapping[str, Any], examples: int) -> torch.Tensor:
    """Return scored positions, or examples where a batch has no labels, shape `()`."""
    if "labels" in inputs:
        return scored_items(inputs)
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    return torch.full((), examples, device=tokens.device)


def _join_documents(inputs: Mapping[str, Any], coming: Mapping[str, Any], wanted: int) -> Joined:
    """Return documents with the first ones of the next batch behind them: in the row, or as a row of their own."""
    for batch in (inputs, coming):
        _check_documents(batch)
    _check_same(inputs, coming)
    numbers, (own_count,) = read(first_documents(coming, wanted), first_documents(inputs, 1)[:1])
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
    items = scored_items(inputs), scored_items(riding)
    tokens = coming["input_ids"]
    which = (torch.arange(tokens.numel(), device=tokens.device) < documents.end).view(tokens.shape)
    return Joined(joined, own, (own_count, documents.taken), documents.end, *items, riding, which)


def _check_documents(batch: Mapping[str, Any]) -> None:
    shape = tuple(batch["input_ids"].shape) if isinstance(batch.get("input_ids"), torch.Tensor) else None
    wrong = [name for name in ("input_ids", "labels") if not isinstance(batch.get(name), torch.Tensor)]
    for name, value in batch.items():
        whole = name in FILLERS or name == NUMBERS
        fits = tuple(getattr(value, "shape", ())) == shape if whole else name in (*BOUNDARIES, *LONGEST)
        if not (fits or _is_setting(value)):
            wrong.append(name)
    if wrong:
        raise CannotJoinError(
            f"batches of {', '.join([*FILLERS, NUMBERS])}, each of shape (batch, length), can be joined; "
            f"{wrong[0]!r} is missing or something else"
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
        k: torch.cat([_filled(x, length, fillers[k]) for x in (v, riding[k])]) if k in fillers else v
        for k, v in inputs.items()
    }
