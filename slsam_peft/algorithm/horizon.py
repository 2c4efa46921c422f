"""Truncates backpropagation around a stack of blocks, and caches the hidden state that enters it.

Below the lowest active block nothing needs a graph, and the second pass of a step differs from the first only from
that block up. So the hidden state that enters it is cut from whatever made it and cached, and the second pass starts
from there. Both are exact.

Blocks are run through forward hooks, which lie outside gradient checkpointing in transformers >= 5.23.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.cut_pass import Cache, CachedHiddenState, Cursor, CutPass, skipped
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.layout import Layout, Upper
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

CACHE_OFF = "the hidden-state cache is off"
RUN_TWICE = "Second passes that would start at such a block run whole: a step costs up to 2 plain ones."

ENTERED = -1  # the place of the hidden state among what a block takes in


class Horizon:
    """Cuts the passes of a step at their lowest active block, in one stack of blocks.

    Blocks are counted from the bottom of the stack here, and depths, as arms have them, over all stacks of the model.

    Args:
        layout (`Layout`): The model's stacks.
        index (`int`): Which of them this one is.
        cache (`Cache`): Counts the memory of kept hidden states; one for all stacks.
        fallbacks (`Fallbacks`): Told of what cannot be cut or kept.
        name (`str`, *optional*, defaults to `""`): What tells the stack from others, for messages.

    Attributes:
        shares (`bool`): Whether blocks were handed a container they could write to (a cache, shared keys and values),
            or the model kept what a block returned (a long skip, a loss on hidden states), or reads of a stack more
            than what leaves its top (features of several blocks). What goes that way may reach some blocks and not
            others.
        skipping (`bool`): Whether the last pass that was cut left blocks out.
        whole (`set[int]`): Blocks at which no second pass may start, since they get more than a hidden state.
    """

    def __init__(self, layout: Layout, index: int, cache: Cache, fallbacks: Fallbacks, name: str = "") -> None:
        self.layout = layout
        self.blocks = layout.stacks[index]
        self.offset = sum(map(len, layout.stacks[:index]))
        self.is_last = index == len(layout.stacks) - 1
        self.name = name
        self.cache = cache
        self.fallbacks = fallbacks
        self.accelerators = rng.accelerators_of(p for block in self.blocks for p in block.parameters())
        self.shares = not self.is_last
        self.skipping = False
        self.whole: set[int] = set()
        self._added: set[int] = set()  # blocks that are given more than what the block below returns
        self._watched: dict[tuple[int, bool, bool], int] = {}  # forwards, by where the pass was cut

    @property
    def _here(self) -> str:
        return f" in {self.name}" if self.name else ""

    def upper(self, index: int) -> Upper:
        """Return what runs from the block at `index` on, later stacks included."""
        return self.layout.upper(self.offset + index)

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
        self.skipping = run.entries != run.forwards * len(self.blocks)
        for cut in run.cuts:
            cut.grad = None
        if run.forwards != len(run.cached_states):
            # The block below the cut was skipped at random, so what came out of it was cut and cached nowhere.
            if run.keep and run.lowest_active > 0:
                self.fallbacks.add(
                    f"second passes of some steps run whole{self._here}",
                    "the block below the lowest active one was skipped at random, as layerdrop does",
                    "Such a step costs up to 2 plain ones.",
                )
            run.cached_states.clear()
            return
        if run.watched:
            self._watched[run.cut] = run.forwards
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
            f"{CACHE_OFF}{self._here}",
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
            places = count()
            args, kwargs = with_sides(lambda side: self._side(side, index, next(places), run), args, kwargs)
            if begins and index < run.lowest_active:
                self._check_start(hidden, run)
            if index == 0 and not below and not hidden.requires_grad and _is_reentrant_throughout(module):
                self._tell_untrained()
            # Below what is trained no graph is wanted, and above it reentrant checkpointing builds none by itself.
            if cuts and hidden.requires_grad:
                check_cut(hidden, self.upper(index), place)
                hidden = hidden.detach()
            if index == run.lowest_active and run.sparse:
                hidden = self._entered(hidden, run)
            if run.watched and index < run.lowest_active:
                hidden = run.side_channels.watched(hidden)
            elif not below and not hidden.requires_grad and _is_reentrant(module):
                hidden = hidden.detach().requires_grad_()
            return with_hidden(hidden, args, kwargs)

        return hook

    def _tell_untrained(self) -> None:
        """Tell that the first block's input requires no gradient, as `enable_input_require_grads` would have it."""
        self.fallbacks.add(
            f"blocks are trained that plain training leaves as they are{self._here}",
            "they are checkpointed reentrantly and their input requires no gradient, so that torch passes none on to "
            "what they hold",
            "To train alike with and without SL-SAM, set use_reentrant=False in activation_checkpointing_kwargs.",
        )

    def _check_start(self, hidden: torch.Tensor, run: CutPass) -> None:
        """Check that the stack does not run on what has left it: cutting that has hidden where it came from.

        Raises:
            CrossLayerDependencyError: it does, or it may.
        """
        if not run.sparse or not run.cached_states:
            return
        if run.watched:
            check_cut(hidden, Upper(), "the blocks", opaque=False, cuts=run.cuts)
        elif run.forwards > (seen := self._watched.get(run.cut, 0)):
            raise CrossLayerDependencyError(
                f"the blocks run {run.forwards} times in this pass, and only {seen} times have been seen not to run "
                "on their own output"
            )

    def _side(self, side: torch.Tensor, index: int, place: int, run: CutPass) -> torch.Tensor:
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
        if index < run.lowest_active or not run.sparse:
            return side
        if run.cursor is not None:  # its gradient goes to where the first pass had it from, with the hidden state's
            source = run.cursor.begun.sides.get((index, place))
            return side if source is None else run.cursor.leaf(source, side)
        if not run.keep:
            return side
        cut = self._from_below(side, found, run)
        if cut is not side and run.cached_states:
            run.cached_states[-1].sides[index, place] = side
        return cut

    def _entered(self, hidden: torch.Tensor, run: CutPass) -> torch.Tensor:
        """Return what the lowest active block is given, where blocks below it are trained.

        It may be more than what the block below has returned: features of images are added between blocks. Then the
        pass is cut behind that, not behind the block, so that one backward runs through all that lies below.
        """
        index = run.lowest_active
        if run.cursor is not None:
            source = run.cursor.begun.sides.get((index, ENTERED))
            return hidden if source is None else run.cursor.leaf(source, hidden)
        if not run.keep or hidden.grad_fn is None:
            return hidden
        cut = self._from_below(hidden, list(leaves(hidden)), run)
        if run.watched or index not in self._added:  # it is known from the next pass on
            self._added.add(index)
            run.spoilt = True
        elif cut is not hidden and run.cached_states:
            run.cached_states[-1].sides[index, ENTERED] = hidden
        if run.watched and not cut.requires_grad:
            run.cuts.append(cut.requires_grad_())
        return cut

    def _from_below(self, tensor: torch.Tensor, found: list, run: CutPass) -> torch.Tensor:
        """Return what a block above the cut takes in past it, without its graph: the second pass makes it again.

        Where something above the cut had a part in it, its graph stays, and the second pass must run whole.
        """
        upper = {id(p) for p in trained(self.upper(run.lowest_active))}
        if not any(leaf is None or id(leaf) in upper for leaf in found):
            return tensor.detach()
        known = upper | {id(cut) for cut in run.cuts}
        run.entangled = run.entangled or any(leaf is None or id(leaf) not in known for leaf in found)
        return tensor

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
        self.cache.count(tensors(cached.tail))

    def _passing(self, index: int, run: CutPass) -> Callable[..., Any]:
        """Return the hook behind the block at `index`, which lies below the cut and not next to it."""
        above = self.upper(run.lowest_active)

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
        above = self.upper(run.lowest_active)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            self.shares = self.shares or not is_immutable((args, *kwargs.values()))
            hidden, tail = split(output)
            if hidden is None:  # what leaves the block cannot be told: the second pass cannot start here
                run.cached_states.append(CachedHiddenState())
                self.fallbacks.add(
                    f"passes are not cut at {type(module).__name__}",
                    "it returns a container (a cache of keys and values, as use_cache=True makes) beside its hidden "
                    "state",
                    "Second passes run whole: such a step costs up to 2 plain ones.",
                )
                return None
            for tensor in tensors((hidden, tail)):
                check_cut(tensor, above, f"block {run.lowest_active}", opaque=not run.sparse)
            self._record(run, hidden, tail)
            cut, *rest = mapped((hidden, *(tail or ())), torch.Tensor.detach)
            if run.sparse_ascent and not run.watched and run.lowest_active in self._added:
                cut = hidden  # the pass is cut where it enters the next block
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
        if self.cache.kept_bytes + size > self.cache.limit_bytes:
            if self.cache.limit_bytes > 0:
                self.fallbacks.add(
                    "some second passes run whole",
                    "hidden states take more than "
                    f"hidden_state_cache_limit_mib={self.cache.limit_bytes / 2**20:g} MiB",
                    "What does not fit is run twice.",
                )
            return
        originals = (hidden, *(tail or ()))
        cached.hidden, *rest = copies = mapped(originals, torch.Tensor.detach)
        cached.tail = None if tail is None else tuple(rest)
        cached.states = [*run.states, rng.snapshot(self.accelerators)]
        if run.sparse:
            pairs = zip(tensors(copies), tensors(originals), strict=True)
            cached.sources = {id(copy): original for copy, original in pairs if original.requires_grad}
        self.cache.count([hidden])


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
