"""Lets ranks tell one another averages of active gradients, and what must be decided alike."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def has_ranks() -> bool:
    """Return whether several processes train together."""
    return dist.is_initialized() and dist.get_world_size() > 1


def of_first_rank(values: list[Any]) -> list[Any]:
    """Return the first rank's `values`; with one process, the list itself."""
    return broadcast_object_list(list(values)) if has_ranks() else values


def wait_for_ranks() -> None:
    """Return once every rank has come here."""
    if has_ranks():
        dist.barrier()


def average_over_ranks(gradients: list[torch.Tensor]) -> None:
    """Replace each gradient by its mean over all ranks, in place; one message per dtype and device.

    Args:
        gradients (`list[torch.Tensor]`): The same tensors, in the same order, on every rank. Only active arms' are
            passed, so only they travel.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for group in groups.values():
        flat = _flatten_dense_tensors(group)
        dist.all_reduce(flat)
        flat.div_(dist.get_world_size())
        torch._foreach_copy_(group, list(_unflatten_dense_tensors(flat, group)))
