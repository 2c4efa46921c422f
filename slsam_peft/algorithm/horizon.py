"""Truncates backpropagation around a stack of blocks, and caches the hidden state that enters it.

Below the lowest active block nothing needs a graph, and the second pass of a step differs from the first only from
that block up. So the hidden state that enters it is cut from whatever made it and cached, and the second pass starts
from there. Both are exact.

Blocks are run through forward hooks, which lie outside gradient checkpointing in transformers >= 5.23. A block's
`forward` is shadowed on the instance only while a pass that skips it runs.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.leaks import CrossLayerDependencyError, check_cut


@dataclass(eq=False)
class CachedHiddenState:
    """What enters the lowest active block in one forward of the stack.

    Args:
        hidden (`torch.Tensor` or `None`): The hidden state, detached; `None` where it is not kept (over the limit, or
            the block returned more than one tensor).
        state (`dict`): Random state at that moment.
        tail (`tuple` or `None`): What follows the hidden state in a block's output, all `None`; `None` where blocks
            return the bare tensor.
        source (`torch.Tensor`, *optional*): The hidden state with the graph of the blocks below.
    """

    hidden: torch.Tensor | None
    state: rng.State
    tail: tuple | None
    source: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the kept hidden state."""
        return 0 if self.hidden is None else self.hidden.numel() * self.hidden.element_size()


@dataclass(eq=False)
class _Cursor:
    """Walks through the cached hidden states of a pass, one per forward of the stack."""

    cached_states: Sequence[CachedHiddenState]
    index: int = 0
    leaves: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def current(self) -> CachedHiddenState | None:
        if self.index < len(self.cached_states) and self.cached_states[self.index].hidden is not None:
            return self.cached_states[self.index]
        return None


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

    def release(self) -> None:
        """Forget that any hidden state is kept; the cached hidden states belong to the caller."""
        self.kept_bytes = 0

    @contextmanager
    def truncated(self, lowest_active: int, lowest_trained: int, *, keep: bool) -> Iterator[list[CachedHiddenState]]:
        """Run a pass whose backward stops at block `lowest_active`.

        Args:
            lowest_active (`int`): Lowest block whose gradient this pass takes, in [0, L]; L: none.
            lowest_trained (`int`): Lowest block that builds a graph. Equal to `lowest_active`, or below it where the
                graph of the blocks below is needed later (sparse ascent, dense descent); -1: so do parameters below
                the stack.
            keep (`bool`): Whether to cache the hidden states that enter `lowest_active`, for `resumed`.

        Yields:
            `list[CachedHiddenState]`: One per forward of the stack, filled as they run.

        Raises:
            CrossLayerDependencyError: the pass cannot be cut; it must run whole.
        """
        cached_states: list[CachedHiddenState] = []
        starts: list[None] = []
        recorder = self._recorder(lowest_active, lowest_trained, cached_states, keep, starts)
        counter = self.blocks[0].register_forward_pre_hook(lambda module, args: starts.append(None))
        try:
            with self._without_graph(lowest_trained), self._hooked(lowest_active, recorder):
                yield cached_states
        finally:
            counter.remove()

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
        cursor = _Cursor(cached_states)
        through = lowest_trained < lowest_active
        with ExitStack() as stack:
            stack.enter_context(self._without_graph(lowest_trained))
            for index, block in enumerate(self.blocks[:lowest_active]):
                skip = _skipping(block, cursor, last=index == lowest_active - 1, through=through)
                stack.enter_context(_shadowed_forward(block, skip))
            stack.enter_context(self._hooked(lowest_active, self._resumer(lowest_active, cursor, through)))
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
            hidden, _ = _split(output)
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

    @contextmanager
    def _hooked(self, lowest_active: int, hook: Any) -> Iterator[None]:
        """Install `hook` where the hidden state enters the lowest active block: at the output of the block below."""
        if lowest_active == 0:
            yield
            return
        handle = self.blocks[lowest_active - 1].register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _without_graph(self, lowest_trained: int) -> Iterator[None]:
        """Keep the blocks below `lowest_trained`, and the stack's input, from building a graph; at -1 nothing changes.

        Parameters below are off already. What is left is an input that requires grad (`enable_input_require_grads`),
        and reentrant checkpointing, which wraps whatever it is given and complains when nothing requires grad.
        """
        if lowest_trained < 0 or (lowest_trained == 0 and _is_reentrant(self.blocks[0])):
            yield
            return
        # Checkpointing is off in the blocks below while they run: they need no graph.
        checkpointed: list[Any] = [
            b for b in self.blocks[:lowest_trained] if getattr(b, "gradient_checkpointing", False)
        ]
        for block in checkpointed:
            block.gradient_checkpointing = False

        # The stack's input is checked, and cut from its graph, when it enters the first block.
        def check(hidden: torch.Tensor) -> None:
            check_cut(hidden, (*self.blocks, *self.above), "the blocks")

        handle = self.blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: _cut_input(args, kwargs, check), with_kwargs=True
        )
        try:
            yield
        finally:
            # The blocks are put back as they were, also after an error.
            handle.remove()
            for block in checkpointed:
                block.gradient_checkpointing = True

    def _recorder(
        self,
        lowest_active: int,
        lowest_trained: int,
        cached_states: list[CachedHiddenState],
        keep: bool,
        starts: list[None],
    ):
        needs_grad = lowest_active < len(self.blocks) and _is_reentrant(self.blocks[lowest_active])

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            self.shares = self.shares or not _immutable((args, *kwargs.values()))
            hidden, tail = _split(output)
            if hidden is None:  # more than a hidden state leaves the block: the second pass cannot start here
                cached_states.append(CachedHiddenState(None, {}, None))
                return None
            above = (*self.blocks[lowest_active:], *self.above)
            check_cut(hidden, above, f"block {lowest_active}", opaque=lowest_trained == lowest_active)
            # A second entry without a new start: what was cut the last time comes from below again.
            if lowest_trained < lowest_active and len(cached_states) == len(starts):
                raise CrossLayerDependencyError(
                    f"block {lowest_active} is entered again, and the first block has not run in between"
                )
            cut, size = hidden.detach(), hidden.numel() * hidden.element_size()
            if keep and self.reuse and self.kept_bytes + size <= self.limit_bytes:
                source = hidden if lowest_trained < lowest_active and hidden.requires_grad else None
                cached_states.append(CachedHiddenState(cut, rng.snapshot(self.accelerators), tail, source))
                self.kept_bytes += size
                self.peak_bytes = max(self.peak_bytes, self.kept_bytes)
            else:
                cached_states.append(CachedHiddenState(None, {}, tail))
            return _joined(cut.detach().requires_grad_(needs_grad and torch.is_grad_enabled()), tail)

        return hook

    def _resumer(self, lowest_active: int, cursor: "_Cursor", through: bool):
        needs_grad = lowest_active < len(self.blocks) and _is_reentrant(self.blocks[lowest_active])

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            cached, cursor.index = cursor.current, cursor.index + 1
            if cached is not None:
                rng.restore(cached.state)
            hidden, tail = _split(output)
            if hidden is None or through:
                return None
            return _joined(hidden.detach().requires_grad_(needs_grad and torch.is_grad_enabled()), tail)

        return hook


def _skipping(block: nn.Module, cursor: _Cursor, *, last: bool, through: bool):
    """Return a stand-in for `block.forward` that passes the hidden state on, the kept one from the last such block."""
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        cached = cursor.current
        if cached is None or cached.hidden is None:
            return original(*args, **kwargs)
        if not last:
            return _joined(args[0] if args else kwargs["hidden_states"], cached.tail)
        hidden = cached.hidden.detach()
        if through and cached.source is not None and torch.is_grad_enabled():
            cursor.leaves.append((cached.source, hidden.requires_grad_()))
        return _joined(hidden, cached.tail)

    return forward


@contextmanager
def _shadowed_forward(block: nn.Module, forward: Any) -> Iterator[None]:
    had_own = "forward" in block.__dict__  # accelerate's device hooks put one there
    own = block.__dict__.get("forward")
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if had_own:
            block.__dict__["forward"] = own
        else:
            del block.__dict__["forward"]


def _cut_input(args: tuple, kwargs: dict[str, Any], check: Callable[[torch.Tensor], None]):
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise CrossLayerDependencyError("the blocks take their hidden state neither first nor as `hidden_states`")
    check(hidden)
    if args:
        return (hidden.detach(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden.detach()}


def _immutable(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_immutable(x) for x in value)
    return value is None or isinstance(value, torch.Tensor | bool | int | float | str)


def _split(output: Any) -> tuple[torch.Tensor | None, tuple | None]:
    """Return the hidden state and what follows it; no hidden state where anything else comes with it."""
    if isinstance(output, torch.Tensor):
        return output, None
    if isinstance(output, tuple) and output and all(x is None for x in output[1:]):
        return output[0], output[1:]
    return None, None


def _joined(hidden: torch.Tensor, tail: tuple | None) -> Any:
    return hidden if tail is None else (hidden, *tail)


def _is_reentrant(block: nn.Module) -> bool:
    """Whether the block is checkpointed the reentrant way (transformers' `GradientCheckpointingLayer`)."""
    if not getattr(block, "gradient_checkpointing", False):
        return False
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", False))
