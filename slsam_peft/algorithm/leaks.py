"""Finds what passes a cut at a block by another way than the hidden state.

A cut drops the gradient of whatever enters below it, and a second pass that starts there takes what entered to be the
same. Three kinds of model break that, and show it only when they run: those that run blocks more than once, on their
own output; those whose blocks are fed from the side by something trained; and those whose loss, or upper blocks, read
more of the lower blocks than their hidden state (losses of routers, long skips, losses on hidden states).
"""

import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from slsam_peft.algorithm.layout import Upper

REENTRANT = "CheckpointFunctionBackward"  # hides what it has run


class CrossLayerDependencyError(RuntimeError):
    """A pass that was cut would have dropped part of the gradient. Raised in the forward, before that happens."""


def check_cut(
    hidden: torch.Tensor,
    above: Upper,
    place: str,
    *,
    opaque: bool = True,
    cuts: Sequence[torch.Tensor] = (),
) -> None:
    """Check that a hidden state may be cut from its graph.

    Args:
        hidden (`torch.Tensor`): What enters the blocks above the cut.
        above (`Upper`): Modules whose trained parameters must not have had a part in it.
        place (`str`): Where the cut is, for the message.
        opaque (`bool`, *optional*, defaults to `True`): Whether reentrant checkpointing counts as such a
            parameter; `False` where blocks below the cut are trained, and checkpointed, too.
        cuts (`Sequence[torch.Tensor]`, *optional*, defaults to `()`): Leaves that must have had no part in it either:
            what was cut before.

    Raises:
        CrossLayerDependencyError: one of them had.
    """
    if not hidden.requires_grad:  # as good as always
        return
    forbidden = {id(leaf) for leaf in (*trained(above), *cuts)}
    if any(opaque if leaf is None else id(leaf) in forbidden for leaf in leaves(hidden)):
        raise CrossLayerDependencyError(
            f"what enters {place} depends on parameters above it (blocks that run on their own output, or are fed "
            "from the side by something trained)"
        )


def trained(modules: Upper) -> Iterator[torch.Tensor]:
    """Yield the parameters of modules that require a gradient, also where w + e stands in the place of w."""
    own = (owner.parameters(recurse=False) for owner in modules.owners)
    for parameter in chain(*(block.parameters() for block in modules.blocks), *own):
        if parameter.requires_grad:
            yield from (leaf for leaf in leaves(parameter) if leaf is not None)


def leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor | None]:
    """Yield the leaves of the graph that made a tensor, and `None` for what reentrant checkpointing hides."""
    if tensor.grad_fn is None:
        yield tensor
        return
    waiting: list[Any] = [tensor.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == REENTRANT:
            yield None
        elif (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)


class SideChannels:
    """Notes whether the backward of a pass that is cut at a block reaches what lies below the cut.

    The hidden state is cut there, so whatever is reached left the blocks below another way, however small its part in
    the loss: the second pass must not leave those blocks out.

    It holds on to no hidden state, so that of the blocks below nothing is kept but what someone else holds on to.
    """

    def __init__(self) -> None:
        self._notes = _Notes()
        self._leaves: list[weakref.ref[torch.Tensor]] = []

    @property
    def found(self) -> bool:
        """Whether it did."""
        return self._notes.found

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The hidden states that stand for what lies below where they were cut, as far as anyone needs them still."""
        return [leaf for known in self._leaves if (leaf := known()) is not None]

    def watched(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return a hidden state that enters a block below the cut, such that a gradient for it is noticed."""
        if not hidden.requires_grad:
            return self.cut(hidden.detach().requires_grad_())
        hidden.register_hook(self._notes.notice)
        return hidden

    def cut(self, output: torch.Tensor) -> torch.Tensor:
        """Return what a block below the cut returned, without its graph, such that a gradient for it is noticed."""
        if not output.requires_grad:  # nothing of the blocks below had a part in it
            return output
        leaf = output.detach().requires_grad_()
        self._leaves.append(weakref.ref(leaf))
        leaf.register_hook(self._notes.notice)
        return leaf

    def close(self) -> None:
        """Notice nothing more: a backward through the blocks below is to come."""
        self._notes.open = False


class _Notes:
    """What the hooks of hidden states write to; it knows none of them, or they would keep one another alive."""

    def __init__(self) -> None:
        self.found, self.open = False, True

    def notice(self, gradient: torch.Tensor) -> None:
        self.found = self.found or self.open
