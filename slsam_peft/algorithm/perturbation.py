"""Holds one step's perturbation e and puts a model's parameters at w + e while a pass runs.

Modules are handed w + e in the place of w, see `swap`, so no weight is written. Where a parameter is not read by its
module (a fused kernel, a list of weights that the module keeps), it is moved in place, and put back bit for bit from a
copy. So are the pieces of sharded parameters.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from slsam_peft.algorithm.shards import local
from slsam_peft.algorithm.swap import Sites, Swap


class Perturbation:
    """The perturbation of a step.

    Args:
        parameters (`Sequence[nn.Parameter]`): The parameters that move.
        offsets (`Sequence[torch.Tensor]`): e, each of its parameter's shape, dtype and device; of a sharded one, of
            this rank's piece.
        sites (`Sites`): Where each of them is read.
        in_place (`Collection[nn.Parameter]`): Those of them that are to be moved in place.
        changed (callable, *optional*): Called when weights have been moved in place or put back.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        offsets: Sequence[torch.Tensor],
        sites: Sites,
        in_place: Collection[nn.Parameter] = (),
        changed: Callable[[], None] | None = None,
    ) -> None:
        self.offsets = dict(zip(parameters, offsets, strict=True))
        self.sites = sites
        self.in_place = in_place
        self._changed = changed
        self._swap: Swap | None = None

    @property
    def swap(self) -> Swap:
        """What is swapped; one for all micro-batches of the step, unless parameters have been found to be bypassed."""
        swapped = [p for p in self.offsets if p not in self.in_place]
        if self._swap is None or self._swap.parameters != swapped:
            self._swap = Swap(swapped, [self.offsets[p] for p in swapped], self.sites)
        return self._swap

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the context's forward and backward at w + e.

        The context must outlive the backward pass: gradient checkpointing reads the weights again there. Whatever
        happens inside, modules have their parameters and the weights are w again, bit for bit, afterwards.
        """
        moved = [p for p in self.offsets if p in self.in_place]
        with self._moved(moved, [self.offsets[p] for p in moved]), self.swap.applied():
            yield

    @contextmanager
    def _moved(self, parameters: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor]) -> Iterator[None]:
        if not parameters:
            yield
            return
        pieces = [local(p) for p in parameters]
        saved = [p.detach().clone() for p in pieces]
        try:
            with torch.no_grad():
                torch._foreach_add_(pieces, list(offsets))
            self._forget_copies()
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(pieces, saved)
            self._forget_copies()

    def _forget_copies(self) -> None:
        """Let nobody read a copy of what has just changed: those in low precision of autocast, those gathered."""
        torch.clear_autocast_cache()
        if self._changed is not None:
            self._changed()
