"""What a cut pass does where a block is entered: cuts the graph of what it takes in, and keeps what comes from below.

These hooks lie outside gradient checkpointing in transformers >= 5.23.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm.cut_pass import CutPass
from slsam_peft.algorithm.cut_stack import CutStack
from slsam_peft.algorithm.layout import Upper
from slsam_peft.algorithm.leaks import CrossLayerDependencyError, check_cut, leaves, trained
from slsam_peft.algorithm.leaving import settle_tail
from slsam_peft.algorithm.outputs import hidden_of, with_hidden, with_sides

ENTERED = -1  # the place of the hidden state among what a block takes in


@dataclass(eq=False)
class Entering:
    """What happens before the blocks of a stack in one cut pass.

    Args:
        stack (`CutStack`): The stack.
        run (`CutPass`): The pass.
    """

    stack: CutStack
    run: CutPass

    def hook(self, index: int) -> Callable[..., Any]:
        """Return the hook that runs before the block at `index`."""
        run = self.run
        below = index < run.lowest_trained
        # What is left there is an input that requires grad (`enable_input_require_grads`). Reentrant checkpointing of
        # the first block relies on it.
        cuts = below or (index == run.lowest_trained == 0 and not _is_reentrant(self.stack.blocks[0]))
        place = f"block {index}" if index else "the blocks"

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            begins = run.see(index)
            hidden = hidden_of(args, kwargs)
            if not isinstance(hidden, torch.Tensor):
                if run.lowest_trained < 0 and run.lowest_active == 0:
                    return None
                raise CrossLayerDependencyError(
                    "the blocks take their hidden state neither first nor as `hidden_states`"
                )
            if index >= run.lowest_active:
                settle_tail(self.stack, run, args, kwargs)
            if not torch.is_grad_enabled():
                return None
            places = count()
            args, kwargs = with_sides(lambda side: self._side(side, index, next(places)), args, kwargs)
            if begins and index < run.lowest_active:
                self._check_start(hidden)
            if index == 0 and not below and not hidden.requires_grad and _is_reentrant_throughout(module):
                self._tell_untrained()
            # Below what is trained no graph is wanted, and above it reentrant checkpointing builds none by itself.
            if cuts and hidden.requires_grad:
                check_cut(hidden, self.stack.upper(index), place)
                hidden = hidden.detach()
            if index == run.lowest_active and run.sparse:
                hidden = self._hidden_entering(hidden)
            if run.watched and index < run.lowest_active:
                hidden = run.side_channels.watched(hidden)
            elif not below and not hidden.requires_grad and _is_reentrant(module):
                hidden = hidden.detach().requires_grad_()
            return with_hidden(hidden, args, kwargs)

        return enter

    def _tell_untrained(self) -> None:
        """Tell that the first block's input requires no gradient, as `enable_input_require_grads` would have it."""
        self.stack.fallbacks.add(
            f"blocks are trained that plain training leaves as they are{self.stack.here}",
            "they are checkpointed reentrantly and their input requires no gradient, so that torch passes none on to "
            "what they hold",
            "To train alike with and without SL-SAM, set use_reentrant=False in activation_checkpointing_kwargs.",
        )

    def _check_start(self, hidden: torch.Tensor) -> None:
        """Check that the stack does not run on what has left it: cutting that has hidden where it came from.

        Raises:
            CrossLayerDependencyError: it does, or it may.
        """
        run = self.run
        if not run.sparse or not run.cached_states:
            return
        if run.watched:
            check_cut(hidden, Upper(), "the blocks", opaque=False, cuts=run.cuts)
        elif run.forwards > (seen := self.stack.watched.get(run.cut, 0)):
            raise CrossLayerDependencyError(
                f"the blocks run {run.forwards} times in this pass, and only {seen} times have been seen not to run "
                "on their own output"
            )

    def _side(self, side: torch.Tensor, index: int, place: int) -> torch.Tensor:
        """Return what the block at `index` takes in beside the hidden state, cut from a graph without a parameter.

        A backward through such a graph (of a frozen encoder whose input requires grad) makes nothing that is wanted,
        and could not be made twice.
        """
        run = self.run
        if not side.requires_grad:
            return side
        if id(side) not in run.sides:
            own = {id(leaf) for leaf in (*run.leaves, *run.side_channels.leaves)}
            found = list(leaves(side))
            needed = any(x is None or isinstance(x, nn.Parameter) or id(x) in own for x in found)
            run.sides[id(side)] = (side, found if needed else [])
        _, found = run.sides[id(side)]
        if not found:
            return side.detach()
        if index < run.lowest_active or not run.sparse:
            return side
        if run.cursor is not None:  # its gradient goes to where the first pass had it from, with the hidden state's
            source = run.cursor.begun.sides.get((index, place))
            return side if source is None else run.cursor.leaf(source, side)
        if not run.keep:
            return side
        cut = self._from_below(side, found)
        if cut is not side and run.cached_states:
            run.cached_states[-1].sides[index, place] = side
        return cut

    def _hidden_entering(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the lowest active block is given, where blocks below it are trained.

        It may be more than what the block below has returned: features of images are added between blocks. Then the
        pass is cut behind that, not behind the block, so that one backward runs through all that lies below.
        """
        run = self.run
        index = run.lowest_active
        if run.cursor is not None:
            source = run.cursor.begun.sides.get((index, ENTERED))
            return hidden if source is None else run.cursor.leaf(source, hidden)
        if not run.keep or hidden.grad_fn is None:
            return hidden
        cut = self._from_below(hidden, list(leaves(hidden)))
        if run.watched or index not in self.stack.added:  # it is known from the next pass on
            self.stack.added.add(index)
            run.spoilt = True
        elif cut is not hidden and run.cached_states:
            run.cached_states[-1].sides[index, ENTERED] = hidden
        if run.watched and not cut.requires_grad:
            run.cuts.append(cut.requires_grad_())
        return cut

    def _from_below(self, tensor: torch.Tensor, found: list) -> torch.Tensor:
        """Return what a block above the cut takes in past it, without its graph: the second pass makes it again.

        Where something above the cut had a part in it, its graph stays, and the second pass must run whole.
        """
        run = self.run
        upper = {id(p) for p in trained(self.stack.upper(run.lowest_active))}
        if not any(leaf is None or id(leaf) in upper for leaf in found):
            return tensor.detach()
        known = upper | {id(cut) for cut in run.cuts}
        run.entangled = run.entangled or any(leaf is None or id(leaf) not in known for leaf in found)
        return tensor


def _is_reentrant(block: nn.Module) -> bool:
    """Whether the block is checkpointed the reentrant way (transformers' `GradientCheckpointingLayer`)."""
    if not getattr(block, "gradient_checkpointing", False):
        return False
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", False))


def _is_reentrant_throughout(block: nn.Module) -> bool:
    """Whether all that is trained in a block is checkpointed the reentrant way: the block itself, or parts of it."""
    inside = {p for part in block.modules() if _is_reentrant(part) for p in part.parameters()}
    return bool(inside) and all(p in inside for p in block.parameters() if p.requires_grad)
