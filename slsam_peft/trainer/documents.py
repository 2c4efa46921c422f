"""Tells documents apart in batches that hold several in one row: padding-free ones, and packed ones by `bfd`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

IGNORED = -100  # label of a position that is not scored
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")  # where documents start, for variable-length attention kernels
LONGEST = ("max_length_q", "max_length_k")  # tokens of the longest document, for the same kernels


def holds_documents(inputs: Mapping[str, Any]) -> bool:
    """Whether a row may hold several documents that do not see one another.

    transformers keeps documents apart by `cu_seq_lens_q` and `cu_seq_lens_k`, or, where no attention mask is passed,
    by position ids that start again. With an attention mask and without boundaries a row is one sequence.

    Args:
        inputs (`Mapping`): A batch.
    """
    if inputs.get(BOUNDARIES[0]) is not None:
        return True
    positions: Any = inputs.get("position_ids")
    return inputs.get("attention_mask") is None and isinstance(positions, torch.Tensor) and positions.dim() == 2


def flattened(inputs: Mapping[str, Any], value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of shape `(batch, length, ...)` as `(batch * length, ...)`, or shape `(length, ...)` of one row.

    Args:
        inputs (`Mapping`): The batch.
        value (`torch.Tensor`): Shape `(batch, length, ...)`, or `(1, length, ...)` that holds for every row.
    """
    rows, length = shape_of(inputs)
    return value.expand(rows, length, *value.shape[2:]).reshape(rows * length, *value.shape[2:])


def shape_of(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Return `(batch, length)` of a batch of tokens or embeddings."""
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    return int(tokens.shape[0]), int(tokens.shape[1])


class Documents(NamedTuple):
    """Where the first documents of a batch end, rows put one behind another.

    A document of one token predicts nothing and is not counted: the collators' padding to a multiple looks like a
    row of such documents.

    Args:
        count (`int`): Documents of two tokens or more in the batch; at least 1.
        taken (`int`): How many of them the first part holds.
        kept (`int`): How many documents that are, those of one token included.
        end (`int`): Tokens of the first part.
        longest (`int`): Tokens of its longest document.
    """

    count: int
    taken: int
    kept: int
    end: int
    longest: int


def first_documents(inputs: Mapping[str, Any], wanted: int) -> torch.Tensor:
    """Return the fields of `Documents` for the first documents of a batch, shape `(5,)`, not read by the host.

    Args:
        inputs (`Mapping`): A batch that holds documents.
        wanted (`int`): How many documents to take, at least 1; all of them where there are fewer.
    """
    begins = _begins(inputs)
    positions = torch.arange(1, len(begins) + 1, device=begins.device)
    sizes = torch.zeros_like(positions).scatter_add_(0, begins.cumsum(0) - 1, torch.ones_like(positions))
    counted = (sizes > 1).cumsum(0)
    taken = counted[-1].clamp(max=wanted)
    # With every document taken the padding behind the last one goes along.
    kept = torch.where(counted[-1] <= wanted, begins.sum(), (counted < wanted).sum() + 1)
    lengths = torch.where(positions <= kept, sizes, 0)
    return torch.stack([counted[-1].clamp(min=1), taken.clamp(min=1), kept, lengths.sum(), lengths.max()])


def read(*numbers: torch.Tensor) -> list[list[int]]:
    """Return the whole numbers of several tensors of one dimension, read by the host at once."""
    values = torch.cat(numbers).tolist()
    sizes = [len(x) for x in numbers]
    return [values[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]


def _begins(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return which tokens begin a document, boolean, rows one behind another.

    Like transformers, which sees a new document wherever a position id is not its predecessor's plus one.
    """
    rows, length = shape_of(inputs)
    boundaries = inputs.get(BOUNDARIES[0])
    if boundaries is not None:
        begins = torch.zeros(rows * length + 1, dtype=torch.bool, device=boundaries.device)
        begins[boundaries.long()] = True
        begins[0] = True
        return begins[:-1]
    positions = inputs["position_ids"].expand(rows, length)
    return (torch.diff(positions, prepend=positions[:, :1], dim=1) != 1).flatten()
