"""Refuses a pass that is cut at a block and feeds what lies below the cut on something trained above it.

A cut drops the gradient of whatever enters below it, and a second pass that starts there takes what entered to be the
same. Two kinds of model break that, and show it only when they run: those that run blocks more than once, on their own
output, and those whose blocks are fed from the side by a module that lies behind them (a projector of images).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

REENTRANT = "CheckpointFunctionBackward"  # hides what it has run


class CrossLayerDependencyError(RuntimeError):
    """A pass that was cut would have dropped part of the gradient. Raised in the forward, before that happens."""


def check_cut(hidden: torch.Tensor, above: Sequence[nn.Module], place: str, *, opaque: bool = True) -> None:
    """Check that a hidden state may be cut from its graph.

    Args:
        hidden (`torch.Tensor`): What enters the blocks above the cut.
        above (`Sequence[nn.Module]`): Modules whose trained parameters must not have had a part in it.
        place (`str`): Where the cut is, for the message.
        opaque (`bool`, *optional*, defaults to `True`): Whether reentrant checkpointing counts as such a
            parameter; `False` where blocks below the cut are trained, and checkpointed, too.

    Raises:
        CrossLayerDependencyError: one of them had.
    """
    if hidden.grad_fn is None:  # as good as always
        return
    trained = {p for module in above for p in module.parameters() if p.requires_grad}
    waiting: list[Any] = [hidden.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) in trained or (opaque and node.name() == REENTRANT):
            raise CrossLayerDependencyError(
                f"what enters {place} depends on parameters above it (blocks that run on their own output, or are fed "
                "from the side by something trained)"
            )
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
