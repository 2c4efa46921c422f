"""What a cut pass does where a block below the cut is left: cuts the graph, and keeps the hidden state going on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.cut_pass import CachedHiddenState, CutPass
from slsam_peft.algorithm.cut_stack import CutStack
from slsam_peft.algorithm.leaks import check_cut
from slsam_peft.algorithm.outputs import is_immutable, joined, mapped, split, tensors


@dataclass(eq=False)
class Leaving:
    """What happens behind the blocks of a stack in one cut pass.

    Args:
        stack (`CutStack`): The stack.
        run (`CutPass`): The pass.
    """

    stack: CutStack
    run: CutPass

    def hook(self, index: int) -> Callable[..., Any]:
        """Return the hook behind the block at `index`, which lies below the cut and not next to it."""
        run = self.run
        above = self.stack.upper(run.lowest_active)

        def leave(module: nn.Module, args: tuple, output: Any) -> Any:
            if run.keep:
                run.states.append(rng.snapshot(self.stack.accelerators))
            # Where it is watched, no graph of a block outlives it but what someone holds on to.
            hidden, tail = split(output)
            if hidden is None or not run.watched or index >= run.lowest_trained or not torch.is_grad_enabled():
                return None
            for tensor in tensors((hidden, tail)):
                check_cut(tensor, above, f"block {index + 1}")
            cut, *rest = mapped((hidden, *(tail or ())), run.side_channels.cut)
            return joined(cut, None if tail is None else tuple(rest))

        return leave

    def hook_at_cut(self) -> Callable[..., Any]:
        """Return the hook where the hidden state enters the lowest active block: behind the block below."""
        run = self.run
        above = self.stack.upper(run.lowest_active)

        def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            self.stack.shares = self.stack.shares or not is_immutable((args, *kwargs.values()))
            hidden, tail = split(output)
            if hidden is None:  # what leaves the block cannot be told: the second pass cannot start here
                run.cached_states.append(CachedHiddenState())
                self.stack.fallbacks.add(
                    f"passes are not cut at {type(module).__name__}",
                    "it returns a container (a cache of keys and values, as use_cache=True makes) beside its hidden "
                    "state",
                    "Second passes run whole: such a step costs up to 2 plain ones.",
                )
                return None
            for tensor in tensors((hidden, tail)):
                check_cut(tensor, above, f"block {run.lowest_active}", opaque=not run.sparse)
            self._record(hidden, tail)
            cut, *rest = mapped((hidden, *(tail or ())), torch.Tensor.detach)
            if run.sparse_ascent and not run.watched and run.lowest_active in self.stack.added:
                cut = hidden  # the pass is cut where it enters the next block
            if run.watched and run.sparse and torch.is_grad_enabled():
                run.cuts.append(cut.requires_grad_())
            run.tail = list(zip(tensors(rest), tensors(run.cached_states[-1].tail), strict=False))
            if run.lowest_active == len(self.stack.blocks):
                settle_tail(self.stack, run, (), {})
            return joined(cut, None if tail is None else tuple(rest))

        return leave

    def _record(self, hidden: torch.Tensor, tail: tuple | None) -> None:
        """Cache a hidden state, if it is to be kept and there is room."""
        run = self.run
        cached = CachedHiddenState()
        run.cached_states.append(cached)
        size = hidden.numel() * hidden.element_size()
        if not run.keep:
            return
        if self.stack.cache.kept_bytes + size > self.stack.cache.limit_bytes:
            if self.stack.cache.limit_bytes > 0:
                self.stack.fallbacks.add(
                    "some second passes run whole",
                    "hidden states take more than "
                    f"hidden_state_cache_limit_mib={self.stack.cache.limit_bytes / 2**20:g} MiB",
                    "What does not fit is run twice.",
                )
            return
        originals = (hidden, *(tail or ()))
        cached.hidden, *rest = copies = mapped(originals, torch.Tensor.detach)
        cached.tail = None if tail is None else tuple(rest)
        cached.states = [*run.states, rng.snapshot(self.stack.accelerators)]
        if run.sparse:
            pairs = zip(tensors(copies), tensors(originals), strict=True)
            cached.sources = {id(copy): original for copy, original in pairs if original.requires_grad}
        self.stack.cache.count([hidden])


def settle_tail(stack: CutStack, run: CutPass, args: tuple, kwargs: dict[str, Any]) -> None:
    """Keep of the tail behind the kept hidden state what the next block is given."""
    if not run.tail:
        return
    given = {id(tensor) for tensor in tensors((args, kwargs))}
    wanted = {id(kept) for passed, kept in run.tail if id(passed) in given}
    run.tail = []
    cached = run.cached_states[-1]
    cached.tail = mapped(cached.tail, lambda tensor: tensor if id(tensor) in wanted else None)
    cached.sources = {key: source for key, source in cached.sources.items() if key in wanted | {id(cached.hidden)}}
    stack.cache.count(tensors(cached.tail))
