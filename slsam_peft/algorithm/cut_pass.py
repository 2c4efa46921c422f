"""What one cut pass has seen, and what it keeps for the second pass of a step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.leaks import SideChannels


@dataclass(eq=False)
class CachedHiddenState:
    """What enters the lowest active block in one forward of the stack.

    Args:
        hidden (`torch.Tensor` or `None`): The hidden state, detached; `None` where it is not kept (over the limit, or
            the block below returns a container beside it).
        tail (`tuple` or `None`): What follows the hidden state in a block's output, detached, with `None` in the place
            of tensors that no block takes in; `None` where blocks return the bare tensor.
        states (`Sequence[rng.State]`): Random state behind each block below, in order: what skips blocks at random
            skips them again.
        sources (`dict[int, torch.Tensor]`): The same tensors with the graph of the blocks below, where that graph is
            needed; by the `id` of the detached ones.
        sides (`dict[tuple[int, int], torch.Tensor]`): What blocks above the cut take in from below it past the hidden
            state, with its graph, likewise; by block and place among what it takes in.
    """

    hidden: torch.Tensor | None = None
    tail: tuple | None = None
    states: Sequence[rng.State] = ()
    sources: dict[int, torch.Tensor] = field(default_factory=dict)
    sides: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Cache:
    """Counts the memory of kept hidden states; they themselves belong to whoever keeps them.

    Args:
        limit_bytes (`float`): Most memory; forwards beyond it are not kept.

    Attributes:
        kept_bytes (`int`): Memory of the hidden states that are kept now.
        peak_bytes (`int`): The most there ever was.
    """

    limit_bytes: float
    kept_bytes: int = 0
    peak_bytes: int = 0

    def count(self, kept: Iterable[torch.Tensor]) -> None:
        """Add tensors that are kept."""
        self.kept_bytes += sum(tensor.numel() * tensor.element_size() for tensor in kept)
        self.peak_bytes = max(self.peak_bytes, self.kept_bytes)

    def release(self) -> None:
        """Forget that anything is kept."""
        self.kept_bytes = 0


@dataclass(eq=False)
class CutPass:
    """One cut pass, and what has been seen of it.

    Args:
        lowest_active (`int`): As in `Horizon.truncated`.
        lowest_trained (`int`): As in `Horizon.truncated`.
        keep (`bool`): As in `Horizon.truncated`.
        watched (`bool`): Whether to look for side channels and for stacks that run on their own output.
        cached_states (`list[CachedHiddenState]`): One per forward.
        cursor (`Cursor` or `None`): What the pass starts from, where it is a second one.
        leaves (`list[torch.Tensor]`): Tensors whose gradient is wanted, beside parameters.
    """

    lowest_active: int
    lowest_trained: int
    keep: bool = False
    watched: bool = False
    cached_states: list[CachedHiddenState] = field(default_factory=list)
    cursor: "Cursor | None" = None
    leaves: list[torch.Tensor] = field(default_factory=list)
    cuts: list[torch.Tensor] = field(default_factory=list)  # what the lowest active block was given, where watched
    tail: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # as given to the model, and as kept
    states: list[rng.State] = field(default_factory=list)  # behind each block below, in this forward
    sides: dict[int, tuple[torch.Tensor, list]] = field(default_factory=dict)  # by id: itself, and leaves it needs
    side_channels: SideChannels = field(default_factory=SideChannels)
    forwards: int = 0
    entries: int = 0  # of blocks
    last: int = -1  # the block that ran last
    entangled: bool = False  # blocks above the cut take in what those above and those below have both made

    spoilt: bool = False  # what it has cached cannot be used

    @property
    def sparse_ascent(self) -> bool:
        """Whether this pass wants no gradient of what it builds a graph for below the cut: a second pass goes on."""
        return self.sparse and self.keep

    @property
    def sparse(self) -> bool:
        """Whether blocks below the lowest active one are trained, so that their graph is needed later."""
        return self.lowest_trained < self.lowest_active

    @property
    def cut(self) -> tuple[int, bool, bool]:
        """What a pass is watched for once."""
        return self.lowest_active, self.sparse, self.keep

    def see(self, index: int) -> bool:
        """Take note that the block at `index` is about to run; return whether it begins a forward of the stack."""
        begins = index <= self.last or self.forwards == 0
        if begins:
            self.forwards += 1
            self.states = []
        self.last = index
        self.entries += 1
        return begins


@dataclass(eq=False)
class Cursor:
    """Walks through the cached hidden states of a pass, one per forward of the stack."""

    cached_states: Sequence[CachedHiddenState]
    index: int = 0
    block: int = 0  # how many blocks of this forward have been skipped
    leaves: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def current(self) -> CachedHiddenState | None:
        """What this forward of the stack starts from; `None` where it runs whole."""
        if self.index < len(self.cached_states) and self.cached_states[self.index].hidden is not None:
            return self.cached_states[self.index]
        return None

    @property
    def begun(self) -> CachedHiddenState:
        """What the forward has started from that is above the cut now; an empty one where it ran whole."""
        cached = self.cached_states[self.index - 1] if 0 < self.index <= len(self.cached_states) else None
        return cached if cached is not None and cached.hidden is not None else CachedHiddenState()

    def leaf(self, source: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return a leaf of some value whose gradient goes to what the first pass had in its place."""
        given = value.detach().requires_grad_()
        self.leaves.append((source, given))
        return given

    def leave_block(self, *, last: bool) -> None:
        """Go on behind a block, with the random state of the first pass; behind the last one to the next forward."""
        cached = self.current
        if cached is not None and self.block < len(cached.states):
            rng.restore(cached.states[self.block])
        self.index, self.block = (self.index + 1, 0) if last else (self.index, self.block + 1)
