"""Truncates backpropagation around a stack of blocks, and caches the hidden state that enters it.

Below the lowest active block nothing needs a graph, and the second pass of a step differs from the first only from
that block up. So the hidden state that enters it is cut from whatever made it and cached, and the second pass starts
from there. Both are exact.

Blocks are run through forward hooks, which lie outside gradient checkpointing in transformers >= 5.23.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.cut_pass import CachedHiddenState, Cursor, CutPass, skipped
from slsam_peft.algorithm.leaks import CrossLayerDependencyError, check_cut, leaves, trained
from slsam_peft.algorithm.outputs import (
    hidden_of,
    is_immutable,
    joined,
    mapped,
    split,
    tensors,
    with_hidden,
    with_sides,
)

logger = logging.getLogger(__name__)


class Horizon:
    """Cuts the passes of a step at their lowest active block.

    Args:
        blocks (`Sequence[nn.Module]`): The stack, lowest first. Each block takes the hidden state first and returns it
            (alone, or as a 1-tuple).
        limit_bytes (`float`): Most memory for kept hidden states; forwards beyond it are not kept.
        above (`Sequence[nn.Module]`, *optional*, defaults to `()`): Modules with trained parameters that are taken to
            run after the blocks.

    Attributes:
        reuse (`bool`): Whether second passes may start at the lowest active block. Turned off for stacks that pass on
            anything but a hidden state.
        shares (`bool`): Whether blocks were handed a container they could write to (a cache, shared keys and values),
            or the model kept what a block returned (a long skip, a loss on hidden states). What goes that way
            may reach some blocks and not others.
        kept_bytes (`int`): Memory of the hidden states that are kept now.
        peak_bytes (`int`): The most there ever was.
    """

    def __init__(self, blocks: Sequence[nn.Module], limit_bytes: float, above: Sequence[nn.Module] = ()) -> None:
        self.blocks = tuple(blocks)
        self.above = tuple(above)
        self.limit_bytes = limit_bytes
        self.accelerators = rng.accelerators_of(p for block in self.blocks for p in block.parameters())
        self.reuse = True
        self.shares = False
        self.kept_bytes = 0
        self.peak_bytes = 0
        self._watched: dict[tuple[int, bool, bool], int] = {}  # forwards, by where the pass was cut
        self._said: set[str] = set()

    def release(self) -> None:
        """Forget that any hidden state is kept; the cached hidden states belong to the caller."""
        self.kept_bytes = 0

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
        run = CutPass(lowest_active, lowest_trained, keep and self.reuse)
        run.watched = lowest_active > 0 and (run.keep or run.sparse) and run.cut not in self._watched
        with ExitStack() as stack:
            self._guard(stack, run)
            for index, block in enumerate(self.blocks[: max(lowest_active - 1, 0)]):
                stack.callback(block.register_forward_hook(self._passing(index, run)).remove)
            if lowest_active > 0:
                below = self.blocks[lowest_active - 1]
                stack.callback(below.register_forward_hook(self._recorder(run), with_kwargs=True).remove)
            yield run.cached_states
        self._judge(run)

    def _judge(self, run: CutPass) -> None:
        """Learn from a pass that has run, forward and backward, what later ones may do."""
        run.side_channels.close()
        for cut in run.cuts:
            cut.grad = None
        if run.forwards != len(run.cached_states):
            # The block below the cut was skipped at random, so what came out of it was cut and cached nowhere.
            run.cached_states.clear()
            return
        if run.watched:
            self._watched[run.cut] = run.forwards
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
            self.reuse = False
            logger.warning("the hidden-state cache is off: %s. Second passes run whole.", reason)

    def _say(self, message: str, *values: Any) -> None:
        """Warn, once per message."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *values)

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
        run, cursor = CutPass(lowest_active, lowest_trained), Cursor(cached_states)
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
        for index, block in enumerate(self.blocks):
            stack.callback(block.register_forward_pre_hook(self._entering(index, run), with_kwargs=True).remove)

    def _entering(self, index: int, run: CutPass) -> Callable[..., Any]:
        """Return the hook that runs before the block at `index`."""
        below = index < run.lowest_trained
        # What is left there is an input that requires grad (`enable_input_require_grads`). Reentrant checkpointing of
        # the first block relies on it.
        cuts = below or (index == run.lowest_trained == 0 and not _is_reentrant(self.blocks[0]))
        place = f"block {index}" if index else "the blocks"

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            begins = run.see(index)
            hidden = hidden_of(args, kwargs)
            if not isinstance(hidden, torch.Tensor):
                if run.lowest_trained < 0 and run.lowest_active == 0:
                    return None
                raise CrossLayerDependencyError(
                    "the blocks take their hidden state neither first nor as `hidden_states`"
                )
            if index >= run.lowest_active:
                self._settle_tail(run, args, kwargs)
            if not torch.is_grad_enabled():
                return None
            args, kwargs = with_sides(lambda side: self._side(side, index, run), args, kwargs)
            if begins and index < run.lowest_active:
                self._check_start(hidden, run)
            # Below what is trained no graph is wanted, and above it reentrant checkpointing builds none by itself.
            if cuts and hidden.requires_grad:
                check_cut(hidden, (*self.blocks, *self.above), place)
                hidden = hidden.detach()
            if run.watched and index < run.lowest_active:
                hidden = run.side_channels.watched(hidden)
            elif not below and not hidden.requires_grad and _is_reentrant(module):
                hidden = hidden.detach().requires_grad_()
            return with_hidden(hidden, args, kwargs)

        return hook

    def _check_start(self, hidden: torch.Tensor, run: CutPass) -> None:
        """Check that the stack does not run on what has left it: cutting that has hidden where it came from.

        Raises:
            CrossLayerDependencyError: it does, or it may.
        """
        if not run.sparse or not run.cached_states:
            return
        if run.watched:
            check_cut(hidden, (), "the blocks", opaque=False, cuts=run.cuts)
        elif run.forwards > (seen := self._watched.get(run.cut, 0)):
            raise CrossLayerDependencyError(
                f"the blocks run {run.forwards} times in this pass, and only {seen} times have been seen not to run "
                "on their own output"
            )

    def _side(self, side: torch.Tensor, index: int, run: CutPass) -> torch.Tensor:
        """Return what the block at `index` takes in beside the hidden state, cut from a graph without a parameter.

        A backward through such a graph (of a frozen encoder whose input requires grad) makes nothing that is wanted,
        and could not be made twice.
        """
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
        if index >= run.lowest_active and run.sparse and not run.entangled:
            upper = {id(p) for p in trained((*self.blocks[run.lowest_active :], *self.above))}
            upper |= {id(cut) for cut in run.cuts}
            run.entangled = any(x is None or id(x) not in upper for x in found)
        return side

    def _settle_tail(self, run: CutPass, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep of the tail behind the kept hidden state what the next block is given."""
        if not run.tail:
            return
        given = {id(tensor) for tensor in tensors((args, kwargs))}
        wanted = {id(kept) for passed, kept in run.tail if id(passed) in given}
        run.tail = []
        cached = run.cached_states[-1]
        cached.tail = mapped(cached.tail, lambda tensor: tensor if id(tensor) in wanted else None)
        cached.sources = {key: source for key, source in cached.sources.items() if key in wanted | {id(cached.hidden)}}
        self._count(tensors(cached.tail))

    def _count(self, kept: Iterable[torch.Tensor]) -> None:
        self.kept_bytes += sum(tensor.numel() * tensor.element_size() for tensor in kept)
        self.peak_bytes = max(self.peak_bytes, self.kept_bytes)

    def _passing(self, index: int, run: CutPass) -> Callable[..., Any]:
        """Return the hook behind the block at `index`, which lies below the cut and not next to it."""
        above = (*self.blocks[run.lowest_active :], *self.above)

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if run.keep:
                run.states.append(rng.snapshot(self.accelerators))
            # Where it is watched, no graph of a block outlives it but what someone holds on to.
            hidden, tail = split(output)
            if hidden is None or not run.watched or index >= run.lowest_trained or not torch.is_grad_enabled():
                return None
            for tensor in tensors((hidden, tail)):
                check_cut(tensor, above, f"block {index + 1}")
            cut, *rest = mapped((hidden, *(tail or ())), run.side_channels.cut)
            return joined(cut, None if tail is None else tuple(rest))

        return hook

    def _recorder(self, run: CutPass) -> Callable[..., Any]:
        """Return the hook where the hidden state enters the lowest active block: behind the block below."""
        above = (*self.blocks[run.lowest_active :], *self.above)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            self.shares = self.shares or not is_immutable((args, *kwargs.values()))
            hidden, tail = split(output)
            if hidden is None:  # what leaves the block cannot be told: the second pass cannot start here
                run.cached_states.append(CachedHiddenState())
                self._say(
                    "passes are not cut at %s: it returns a container (a cache of keys and values, as use_cache=True "
                    "makes) beside its hidden state. Second passes run whole.",
                    type(module).__name__,
                )
                return None
            for tensor in tensors((hidden, tail)):
                check_cut(tensor, above, f"block {run.lowest_active}", opaque=not run.sparse)
            self._record(run, hidden, tail)
            cut, *rest = mapped((hidden, *(tail or ())), torch.Tensor.detach)
            if run.watched and run.sparse and torch.is_grad_enabled():
                run.cuts.append(cut.requires_grad_())
            run.tail = list(zip(tensors(rest), tensors(run.cached_states[-1].tail), strict=False))
            if run.lowest_active == len(self.blocks):
                self._settle_tail(run, (), {})
            return joined(cut, None if tail is None else tuple(rest))

        return hook

    def _record(self, run: CutPass, hidden: torch.Tensor, tail: tuple | None) -> None:
        """Cache a hidden state, if it is to be kept and there is room."""
        cached = CachedHiddenState()
        run.cached_states.append(cached)
        size = hidden.numel() * hidden.element_size()
        if not run.keep:
            return
        if self.kept_bytes + size > self.limit_bytes:
            if self.limit_bytes > 0:
                self._say(
                    "hidden states take more than hidden_state_cache_limit_mib=%g MiB: second passes of what does not "
                    "fit run whole.",
                    self.limit_bytes / 2**20,
                )
            return
        originals = (hidden, *(tail or ()))
        cached.hidden, *rest = copies = mapped(originals, torch.Tensor.detach)
        cached.tail = None if tail is None else tuple(rest)
        cached.states = [*run.states, rng.snapshot(self.accelerators)]
        if run.sparse:
            pairs = zip(tensors(copies), tensors(originals), strict=True)
            cached.sources = {id(copy): original for copy, original in pairs if original.requires_grad}
        self._count([hidden])


def _is_reentrant(block: nn.Module) -> bool:
    """Whether the block is checkpointed the reentrant way (transformers' `GradientCheckpointingLayer`)."""
    if not getattr(block, "gradient_checkpointing", False):
        return False
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", False))
