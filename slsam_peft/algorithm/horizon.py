"""Truncates backpropagation around a stack of blocks, and caches the hidden state that enters it.

Below the lowest active block nothing needs a graph, and the second pass of a step differs from the first only from
that block up. So the hidden state that enters it is cut from whatever made it and cached, and the second pass starts
from there. Both are exact.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm.cut_pass import Cache, CachedHiddenState, Cursor, CutPass
from slsam_peft.algorithm.cut_stack import CutStack
from slsam_peft.algorithm.entering import Entering
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.layout import Layout
from slsam_peft.algorithm.leaving import Leaving
from slsam_peft.algorithm.outputs import split
from slsam_peft.algorithm.skipping import skipped

CACHE_OFF = "the hidden-state cache is off"
RUN_TWICE = "Second passes that would start at such a block run whole: a step costs up to 2 plain ones."


class Horizon(CutStack):
    """Cuts the passes of a step at their lowest active block, in one stack of blocks, see `CutStack`.

    Attributes:
        skipping (`bool`): Whether the last pass that was cut left blocks out.
        whole (`set[int]`): Blocks at which no second pass may start, since they get more than a hidden state.
    """

    def __init__(self, layout: Layout, index: int, cache: Cache, fallbacks: Fallbacks, name: str = "") -> None:
        super().__init__(layout, index, cache, fallbacks, name)
        self.skipping = False
        self.whole: set[int] = set()

    @contextmanager
    def truncated(self, lowest_active: int, lowest_trained: int, *, keep: bool) -> Iterator[list[CachedHiddenState]]:
        """Run a pass whose backward stops at block `lowest_active`.

        The first one that is cut there also looks whether anything but the hidden state leaves the blocks below: by
        the graph, so that it is seen however little it counts.

        Args:
            lowest_active (`int`): Lowest block whose gradient this pass takes, in [0, L]; L: none.
            lowest_trained (`int`): Lowest block that builds a graph. Equal to `lowest_active`, or below it where the
                graph of the blocks below is needed later (sparse ascent, dense descent); -1: so do parameters below
                the stack.
            keep (`bool`): Whether to cache the hidden states that enter `lowest_active`, for `resumed`.

        Yields:
            `list[CachedHiddenState]`: One per forward of the stack, filled as they run; empty after the context where
            no second pass may start from them.

        Raises:
            CrossLayerDependencyError: the pass cannot be cut; it must run whole.
        """
        run = CutPass(lowest_active, lowest_trained, keep and lowest_active not in self.whole)
        run.watched = lowest_active > 0 and (run.keep or run.sparse) and run.cut not in self.watched
        with ExitStack() as stack:
            self._guard(stack, run)
            leaving = Leaving(self, run)
            for index, block in enumerate(self.blocks[: max(lowest_active - 1, 0)]):
                stack.callback(block.register_forward_hook(leaving.hook(index)).remove)
            if lowest_active > 0:
                below = self.blocks[lowest_active - 1]
                stack.callback(below.register_forward_hook(leaving.hook_at_cut(), with_kwargs=True).remove)
            yield run.cached_states
        self._judge(run)

    def _judge(self, run: CutPass) -> None:
        """Learn from a pass that has run, forward and backward, what later ones may do."""
        run.side_channels.close()
        self.skipping = run.entries != run.forwards * len(self.blocks)
        for cut in run.cuts:
            cut.grad = None
        if run.forwards != len(run.cached_states):
            # The block below the cut was skipped at random, so what came out of it was cut and cached nowhere.
            if run.keep and run.lowest_active > 0:
                self.fallbacks.add(
                    f"second passes of some steps run whole{self.here}",
                    "the block below the lowest active one was skipped at random, as layerdrop does",
                    "Such a step costs up to 2 plain ones.",
                )
            run.cached_states.clear()
            return
        if run.watched:
            self.watched[run.cut] = run.forwards
        if run.spoilt:
            run.cached_states.clear()
        if run.side_channels.found:
            self._stop_reuse(
                run,
                f"the loss depends on more of the blocks below block {run.lowest_active} than the hidden state that "
                "enters it (as losses of routers and losses on hidden states do)",
            )
        elif run.entangled and run.sparse:
            self._stop_reuse(run, "blocks are fed from the side by something trained, or checkpointed reentrantly")

    def _stop_reuse(self, run: CutPass, reason: str) -> None:
        run.cached_states.clear()
        if run.keep:
            self.stop_reuse(run.lowest_active, reason)

    def stop_reuse(self, lowest_active: int, reason: str) -> None:
        """Let second passes that would start at a block run whole from now on."""
        self.whole.add(lowest_active)
        self.shares = True  # so that what has been seen of one block says nothing of others
        self.fallbacks.add(
            f"{CACHE_OFF}{self.here}",
            reason,
            RUN_TWICE,
        )

    @contextmanager
    def resumed(
        self, lowest_active: int, lowest_trained: int, cached_states: Sequence[CachedHiddenState]
    ) -> Iterator[None]:
        """Run a pass that starts at block `lowest_active` from kept hidden states.

        Its backward stops at that block where `lowest_trained` equals it; otherwise it goes on through the kept
        graphs when the context ends. Forwards without a kept hidden state run whole.

        Args:
            lowest_active (`int`): As in `truncated`.
            lowest_trained (`int`): As in `truncated`.
            cached_states (`Sequence[CachedHiddenState]`): What `truncated` yielded for the same closure.

        Raises:
            RuntimeError: the pass entered the lowest active block another number of times than the first one.
        """
        cursor = Cursor(cached_states)
        run = CutPass(lowest_active, lowest_trained, cursor=cursor)
        with ExitStack() as stack:
            self._guard(stack, run)
            for index, block in enumerate(self.blocks[:lowest_active]):
                stack.enter_context(skipped(block, cursor, run, last=index == lowest_active - 1))
            yield
        if cursor.index != len(cached_states):
            raise RuntimeError(
                f"the second pass entered block {lowest_active} {cursor.index} times and the first "
                f"{len(cached_states)} times, so what was kept does not fit. Turn off what skips blocks at "
                "random (layerdrop=0), or set "
                "hidden_state_cache_limit_mib=0 to run second passes whole."
            )
        reached = [(source, leaf.grad) for source, leaf in cursor.leaves if leaf.grad is not None]
        if reached:
            torch.autograd.backward([source for source, _ in reached], [gradient for _, gradient in reached])

    @contextmanager
    def noting_kept(self, lowest_active: int) -> Iterator[None]:
        """Note in `shares` whether a resumed pass without a graph holds on to a hidden state that is not its own.

        Nothing but the next block should: by the time the last one returns, all but its own input are gone. Hidden
        states below the one that enters `lowest_active` are wrong in such a pass already, so its loss tells of them.
        """
        returned: list[weakref.ref[torch.Tensor]] = []

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            hidden, _ = split(output)
            if hidden is not None:
                returned.append(weakref.ref(hidden))

        def look(module: nn.Module, args: tuple, output: Any) -> None:
            self.shares = self.shares or any(kept() is not None for kept in returned)
            returned.clear()

        with ExitStack() as stack:
            for block in self.blocks[lowest_active - 1 : -2]:
                stack.callback(block.register_forward_hook(note).remove)
            stack.callback(self.blocks[-1].register_forward_hook(look).remove)
            yield

    def _guard(self, stack: ExitStack, run: CutPass) -> None:
        """Turn checkpointing off in blocks that need no graph, and see to what every block is given."""
        # Reentrant checkpointing wraps whatever it is given, and complains when nothing requires grad.
        for block in self.blocks[: max(run.lowest_trained, 0)]:
            if getattr(block, "gradient_checkpointing", False):
                stack.callback(setattr, block, "gradient_checkpointing", True)
                setattr(block, "gradient_checkpointing", False)  # noqa: B010 - a module's own attribute, not torch's
        entering = Entering(self, run)
        for index, block in enumerate(self.blocks):
            stack.callback(block.register_forward_pre_hook(entering.hook(index), with_kwargs=True).remove)
