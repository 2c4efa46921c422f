"""Sees in a pass in which order stacks of blocks run, and where between them what lies outside runs."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm.layout import Layout


class RunOrder:
    """Finds out for a layout what of it is a guess.

    Args:
        layout (`Layout` or `None`): The layout; `None` where there is none to be seen.
    """

    def __init__(self, layout: Layout | None) -> None:
        self._layout = layout if layout is not None and layout.stacks else None
        self._ran: list[nn.Module] = []  # blocks, by their first run
        self._after: dict[nn.Module, int] = {}  # how many of them had run before a module outside did

    @property
    def unsure(self) -> bool:
        """Whether something is to be seen yet."""
        return self._layout is not None and self._layout.is_guess

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note, inside the context, what runs after what."""
        if self._layout is None or not self._layout.is_guess:
            yield
            return
        known = set(self._ran)

        def block_ran(module: nn.Module, args: tuple, output: Any) -> None:
            if module not in known:
                known.add(module)
                self._ran.append(module)

        def runs(module: nn.Module, args: tuple) -> None:
            self._after.setdefault(module, len(self._ran))

        with ExitStack() as stack:
            for block in self._layout.blocks:
                stack.callback(block.register_forward_hook(block_ran).remove)
            for module in dict.fromkeys(self._layout.unsure.values()):
                stack.callback(module.register_forward_pre_hook(runs).remove)
            yield

    def settle(self, reduce: Callable[[list[torch.Tensor]], None] | None, device: torch.device) -> bool:
        """Tell the layout what has been seen so far, if anything has; return whether that changes it.

        Args:
            reduce (callable or `None`): Averages tensors over ranks, in place: all of them must come to the same end.
            device (`torch.device`): Where it wants them.
        """
        layout = self._layout
        if layout is None:
            return False
        sums = self._seen(layout).to(device)
        if reduce is not None:  # on every rank, also where no block ran
            reduce([sums])
        if not bool(sums[1].any()):
            return False
        found = (sums[0] / sums[1]).double().cpu()  # NaN where nobody has seen it
        count = len(layout.stacks)
        return layout.settle(found[: count * count].view(count, count), found[count * count :])

    def _seen(self, layout: Layout) -> torch.Tensor:
        """Return what has been seen and whether it has been, shape `(2, stacks * stacks + unsure modules)`."""
        index = {block: i for i, block in enumerate(layout.blocks)}
        first = {block: i for i, block in enumerate(self._ran)}
        starts = [min((first[b] for b in stack if b in first), default=math.nan) for stack in layout.stacks]
        seen: list[tuple[float, float]] = []
        for one in starts:
            seen += [(float(one < other), float(one == one and other == other)) for other in starts]
        for module in layout.unsure.values():
            after = self._after.get(module)
            if after is None:
                seen.append((0.0, 0.0))
            else:
                last = len(layout.blocks) if after == len(self._ran) else index[self._ran[after - 1]] if after else -1
                seen.append((float(last), 1.0))
        return torch.tensor(seen).view(-1, 2).t().contiguous()
