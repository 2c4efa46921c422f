"""Knows in which order the stacks of blocks run, and where between them the trained modules outside run.

At first it is a guess, by the order in which modules are registered. That does not tell: some heads are registered
before the body that feeds them, some projections behind the blocks that they feed, some towers behind the decoder.
`order.py` sees it in a pass.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn


class Upper(NamedTuple):
    """What runs from some block on.

    Args:
        blocks (`tuple[nn.Module, ...]`): Blocks, with everything inside them.
        owners (`tuple[nn.Module, ...]`): Modules outside the blocks, with the parameters that are their very own.
    """

    blocks: tuple[nn.Module, ...] = ()
    owners: tuple[nn.Module, ...] = ()


class Layout:
    """Where blocks, and the modules outside them, run.

    A depth is the index of a block in the order in which blocks run, over all stacks. What runs outside the blocks has
    the depth of the block that has run last before it; -1 where none has, the number of blocks behind all of them.

    Args:
        stacks (`Mapping[str, tuple[nn.Module, ...]]`): The stacks that hold something trained, by name.

    Attributes:
        names (`dict[nn.Module, str]`): The names of the stacks, by their first blocks.
        stacks (`list[tuple[nn.Module, ...]]`): The same, in the order in which they are taken to run.
        outside (`dict[nn.Module, int]`): Depths of the modules outside the blocks that own something trained.
        unsure (`dict[nn.Module, nn.Module]`): Those of them whose depth is a guess until a pass has shown it, and the
            modules that tell when they run.
    """

    def __init__(self, stacks: Mapping[str, tuple[nn.Module, ...]]) -> None:
        self.stacks = list(stacks.values())
        self.names = {stack[0]: name for name, stack in stacks.items()}
        self.outside: dict[nn.Module, int] = {}
        self.unsure: dict[nn.Module, nn.Module] = {}
        self._sharing: dict[nn.Module, set[nn.Module]] = {}  # what reads parameters of a module outside, too
        self._settled = len(self.stacks) < 2

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stacks, in order."""
        return [block for stack in self.stacks for block in stack]

    @property
    def is_guess(self) -> bool:
        """Whether some of it is to be seen yet."""
        return bool(self.unsure) or not self._settled

    def place(self, owner: nn.Module, depth: int, unsure: bool, runs: nn.Module) -> None:
        """Note where a module outside the blocks is taken to run, and which module tells when it does."""
        self.outside[owner] = depth
        if unsure:
            self.unsure[owner] = runs

    def share(self, anchors: Iterable[nn.Module]) -> None:
        """Note that some blocks and modules outside them read one parameter."""
        together = set(anchors)
        for anchor in together & self.outside.keys():
            self._sharing.setdefault(anchor, set()).update(together)

    def depth(self, anchors: Iterable[nn.Module]) -> int | None:
        """Return the lowest depth of some blocks and modules outside them; `None` in a model without blocks."""
        if not self.stacks:
            return None
        index = self._index()
        return min(index[anchor] for anchor in anchors)

    def _index(self) -> dict[nn.Module, int]:
        return {block: i for i, block in enumerate(self.blocks)} | self.outside

    def upper(self, depth: int) -> Upper:
        """Return what runs from a depth on, and nowhere below."""
        index = self._index()
        owners = tuple(
            owner for owner in self.outside if all(index[m] >= depth for m in (owner, *self._sharing.get(owner, ())))
        )
        return Upper(tuple(self.blocks[max(depth, 0) :]), owners)

    def settle(self, before: torch.Tensor, depths: torch.Tensor) -> bool:
        """Take over what a pass has shown; return whether anything has changed.

        Args:
            before (`torch.Tensor`): Share of the passes in which one stack began before another, NaN where they have
                not been seen together; shape `(stacks, stacks)`.
            depths (`torch.Tensor`): Depths of the modules in `unsure`, in order, NaN where they have not run; by the
                order of stacks as it was.
        """
        was, old = (list(self.stacks), dict(self.outside)), self.blocks
        # Stacks that have not been seen together stay in the order in which they are registered.
        count = len(self.stacks)
        registered = torch.ones(count, count).triu(1)
        first = torch.where(before.isnan(), registered, (before > 0.5).to(registered))
        self.stacks = [self.stacks[i] for i in torch.argsort(first.sum(0), stable=True).tolist()]
        index = {block: i for i, block in enumerate(self.blocks)}
        for owner, depth in self.outside.items():
            self.outside[owner] = index[old[depth]] if 0 <= depth < len(old) else depth
        for owner, found in zip(self.unsure, depths.tolist(), strict=True):
            if found == found:  # it has run
                depth = int(found)
                self.outside[owner] = index[old[depth]] if 0 <= depth < len(old) else depth
        self.unsure, self._settled = {}, True
        return was != (self.stacks, self.outside)
