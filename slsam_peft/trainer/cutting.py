"""Cuts a trainer's micro-batch by sequences: its first ones are what an ascent pass of its own runs on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from trl import DPOTrainer, KTOTrainer

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
from slsam_peft.trainer.images import CannotCutError, ImageCounts, by_rows, cut_images, joined_parts

__all__ = ["CannotCutError", "Cut", "ImageCounts", "count_sequences", "coupled", "first_sequences", "scored_items"]

# Losses of TRL 1.16 that are a mean over pairs of something that only the pair itself decides.
MEANS_OVER_PAIRS = frozenset(
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard apo_zero apo_down discopop sigmoid_norm".split()
)
FIRST_OF_BATCH = ("input_ids", "inputs_embeds", "labels", "input_features")  # what tells the number of rows
SOUNDS = ("input_features", "input_values", "feature_attention_mask", "audio_", "input_audio")


class Cut(NamedTuple):
    """The first sequences of a batch.

    Args:
        inputs (`dict`): A batch that holds them alone.
        taken (`int`): How many they are.
        sequences (`int`): How many the whole batch holds.
    """

    inputs: dict[str, Any]
    taken: int
    sequences: int


def count_sequences(inputs: Mapping[str, Any], stacked: int = 1) -> int:
    """Return how many sequences, or pairs of them, a batch holds.

    A row is a sequence, with one exception: where documents are told apart inside a row, each of at least two tokens
    is one. The host reads at most one number, and none where rows are counted.

    Args:
        inputs (`Mapping`): A batch.
        stacked (`int`, *optional*, defaults to `1`): Rows per example: TRL puts chosen rows above rejected ones.

    Raises:
        CannotCutError: the batch holds no texts, or an odd number of rows where pairs are stacked.
    """
    if stacked == 1 and _has_texts(inputs) and holds_documents(inputs):
        return read(first_documents(inputs, 1)[:1])[0][0]
    return _rows_of(inputs) // _checked(inputs, stacked)


def first_sequences(
    inputs: Mapping[str, Any], wanted: int, stacked: int = 1, images: ImageCounts | None = None
) -> Cut:
    """Return the first sequences of a batch, so that a model's loss on them is theirs alone.

    Rows stay as long as they are. Documents keep their row where they lie in the first one or fill whole rows, and
    else make one row; a document's first token is not predicted from the document before. The host reads nothing for
    rows of text, and a few numbers at once for documents and for images.

    Args:
        inputs (`Mapping`): A batch. Tensors and lists with one entry per row or example are cut, single values,
            texts and `None` are passed on.
        wanted (`int`): How many sequences (pairs where `stacked` is 2), at least 1; where the batch has no more,
            everything is taken.
        stacked (`int`, *optional*, defaults to `1`): Rows per example: TRL puts chosen rows above rejected ones.
        images (`ImageCounts`, *optional*): What the model's config says about images; needed where rows or documents
            hold different numbers of them.

    Returns:
        `Cut`: The smaller batch, and how many of how many sequences it holds.

    Raises:
        ValueError: `wanted` is below 1.
        CannotCutError: the batch cannot be cut by sequences.
    """
    if wanted < 1:
        raise ValueError(f"wanted={wanted} must be at least 1: an ascent needs a sequence.")
    if stacked == 1 and _has_texts(inputs) and holds_documents(inputs):
        (numbers,) = read(first_documents(inputs, wanted))
        documents = Documents(*numbers)
        if documents.taken == documents.count:
            return Cut(dict(inputs), documents.count, documents.count)
        return Cut(cut_documents(inputs, documents, images), documents.taken, documents.count)
    rows = _rows_of(inputs)
    examples = rows // _checked(inputs, stacked)
    if wanted >= examples:
        return Cut(dict(inputs), examples, examples)
    return Cut(_cut_rows(inputs, rows, examples, wanted, images), wanted, examples)


def scored_items(inputs: Mapping[str, Any], *, shifted: bool = True) -> torch.Tensor:
    """Return how many positions a model's loss scores, shape `()`, not read by the host.

    Where a position is scored by its successor's label, the first column never counts. TRL's and transformers'
    collators ignore the label of each document's first token; where another collator does not, the loss counts it, and
    so does this.

    Args:
        inputs (`Mapping`): A batch with `shift_labels`, `labels` or, as DPO's, `completion_mask`.
        shifted (`bool`, *optional*, defaults to `True`): Whether a position is scored by its successor's label, as in
            causal models; else by its own, as in encoder-decoders.

    Raises:
        ValueError: it has none of them.
    """
    if inputs.get("shift_labels") is not None:
        return (inputs["shift_labels"] != IGNORED).sum()
    labels = inputs.get("labels")
    if labels is not None:
        return ((labels[..., 1:] if shifted and labels.dim() > 1 else labels) != IGNORED).sum()
    if inputs.get("completion_mask") is not None:
        return (inputs["completion_mask"][..., 1:] != 0).sum()
    raise ValueError(f"a batch of {', '.join(map(str, inputs))} holds no labels, so nothing says what is scored.")


def coupled(trainer: Any) -> str | None:
    """Return why a trainer's loss on some sequences is no part of its loss on all of them; `None` where it is.

    Args:
        trainer (`Trainer`): TRL's or transformers'.

    Returns:
        `str` or `None`: A clause without a full stop.
    """
    if isinstance(trainer, KTOTrainer):
        return "KTO's loss compares every sequence with a divergence that is estimated over the whole batch"
    if not isinstance(trainer, DPOTrainer):
        return None
    arguments: Any = trainer.args
    others = [name for name in arguments.loss_type if name not in MEANS_OVER_PAIRS]
    return f"DPO's loss_type {others[0]!r} is no mean of terms that each belong to one pair" if others else None


def cut_documents(
    inputs: Mapping[str, Any], documents: Documents, images: ImageCounts | None = None
) -> dict[str, Any]:
    """Return a batch of the first documents of a batch.

    Args:
        inputs (`Mapping`): A batch that holds documents.
        documents (`Documents`): Where they end.
        images (`ImageCounts`, *optional*): What the model's config says about images.

    Raises:
        CannotCutError: the batch holds something that is not one entry per token.
    """
    rows, length = shape_of(inputs)
    end = documents.end
    tokens = inputs.get("input_ids")
    parts = [] if tokens is None else [tokens.flatten()[:end], tokens.flatten()[end:]]
    cut, pictures = cut_images(inputs, parts, [(0, 1)], images)
    _refuse_sounds(inputs)
    for name, value in inputs.items():
        if name in BOUNDARIES:
            cut[name] = value[: documents.kept + 1]
        elif name in LONGEST:
            cut[name] = torch.full_like(value, documents.longest) if _is_tensor(value) else documents.longest
        elif name in pictures:
            continue
        elif _is_tensor(value) and value.dim() > 1 and tuple(value.shape[:2]) in ((rows, length), (1, length)):
            cut[name] = _first_tokens(name, inputs, value, end)
        elif _is_one(value):
            cut[name] = value
        else:
            raise CannotCutError(f"{name!r} is not one entry per token of its {rows} rows of {length}")
    return cut


def _first_tokens(name: str, inputs: Mapping[str, Any], value: torch.Tensor, end: int) -> torch.Tensor:
    """Return the first tokens of a value of shape `(batch, length, ...)`: whole rows, or one row."""
    length = shape_of(inputs)[1]
    tokens = flattened(inputs, value)[:end]
    if end % length == 0:
        return tokens.reshape(end // length, length, *value.shape[2:])
    if name == "labels" and end > length:  # a row's first label was nobody's target, and now has one before it
        tokens = tokens.clone()
        tokens[::length] = IGNORED
    return tokens[None]


def _cut_rows(
    inputs: Mapping[str, Any], rows: int, examples: int, wanted: int, images: ImageCounts | None
) -> dict[str, Any]:
    """Return the first examples of a batch in which a row, or `rows / examples` of them, is an example."""
    spans = [(start, start + wanted) for start in range(0, rows, examples)]
    _refuse_sounds(inputs)
    if by_rows(inputs, rows):
        cut, pictures = _without_pictures(inputs, spans)
    else:
        cut, pictures = cut_images(inputs, _texts(inputs), spans, images)
        _refuse_other_pixels(inputs, pictures)
    for name, value in inputs.items():
        if name in pictures:
            continue
        if _is_one(value):
            cut[name] = value
        elif name == "position_ids" and _is_tensor(value) and value.dim() == 3 and value.shape[1] == rows:
            cut[name] = torch.cat([value[:, start:stop] for start, stop in spans], dim=1)  # several axes, rows second
        elif not isinstance(value, list | torch.Tensor) or len(value) not in (rows, examples):
            raise CannotCutError(f"{name!r} has no entry for each of its {examples} sequences")
        else:
            cut[name] = joined_parts(value, spans if len(value) == rows else spans[:1])
    return cut


def _without_pictures(inputs: Mapping[str, Any], spans: Sequence[tuple[int, int]]) -> tuple[dict[str, Any], set[str]]:
    """Return which values to leave out where rows hold their own images and those of the spans hold none."""
    pixels = joined_parts(inputs["pixel_values"], spans)
    if pixels.dim() != 5 or read(pixels.any().view(1).long())[0][0]:  # images that only fill up a row are 0 all over
        return {}, set()
    return {}, {name for name in inputs if name.startswith(("pixel_", "image_"))}


def _texts(inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    tokens = inputs.get("input_ids")
    return [] if tokens is None else list(tokens)


def _has_texts(inputs: Mapping[str, Any]) -> bool:
    return any(inputs.get(name) is not None for name in ("input_ids", "inputs_embeds"))


def _rows_of(inputs: Mapping[str, Any]) -> int:
    first = next((inputs[name] for name in FIRST_OF_BATCH if inputs.get(name) is not None), None)
    if first is None:
        raise CannotCutError(f"it holds none of {', '.join(FIRST_OF_BATCH)}, but {', '.join(map(str, inputs))}")
    return len(first)


def _checked(inputs: Mapping[str, Any], stacked: int) -> int:
    rows = _rows_of(inputs)
    if rows % stacked or rows < stacked:
        raise CannotCutError(f"its {rows} rows are not {stacked} for each example")
    return stacked


def _refuse_sounds(inputs: Mapping[str, Any]) -> None:
    """Refuse sounds beside a text: how many tokens stand for one is counted differently by every model."""
    sounds = [name for name in inputs if name.startswith(SOUNDS) and inputs[name] is not None]
    if sounds and "input_ids" in inputs:
        raise CannotCutError(f"it holds sounds ({sounds[0]!r}), which cannot be told apart by the text's tokens")


def _refuse_other_pixels(inputs: Mapping[str, Any], pictures: set[str]) -> None:
    """Refuse images under names that are not known: their first dimension may be anything."""
    others = [k for k, v in inputs.items() if k.startswith("pixel_") and v is not None and k not in pictures]
    if others:
        raise CannotCutError(f"it holds images as {others[0]!r}, and nothing says how they are laid out")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_one(value: Any) -> bool:
    """Whether a value is a single one for the whole batch."""
    return value is None or isinstance(value, bool | int | float | str) or (_is_tensor(value) and value.dim() == 0)
