"""Holds the horizons of a model's stacks of blocks: an encoder's and a decoder's, a vision tower's and a decoder's.

A pass is cut in the stack in which its lowest active block lies. Stacks that run before it run forward as they are;
those behind it are run through whole.
"""

from collections.abc import Sequence

from slsam_peft.algorithm.cut_pass import Cache
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.horizon import Horizon
from slsam_peft.algorithm.layout import Layout


class Horizons:
    """The horizons of a model.

    Args:
        layout (`Layout`): Its stacks.
        limit_bytes (`float`): Most memory for kept hidden states; forwards beyond it are not kept.
        fallbacks (`Fallbacks`): Told of what cannot be cut or kept.

    Attributes:
        stacks (`list[Horizon]`): Those in which passes are cut.
        cache (`Cache`): Counts the memory of kept hidden states.
    """

    def __init__(self, layout: Layout, limit_bytes: float, fallbacks: Fallbacks) -> None:
        self.cache = Cache(limit_bytes)
        names = [layout.names[stack[0]] if len(layout.stacks) > 1 else "" for stack in layout.stacks]
        self.stacks = [Horizon(layout, i, self.cache, fallbacks, name) for i, name in enumerate(names)]

    def at(self, depth: int) -> Horizon | None:
        """Return the horizon of the stack at a depth; `None` below all of them, and where passes are not cut."""
        return next((h for h in self.stacks if h.offset <= depth < h.offset + len(h.blocks) + h.is_last), None)

    def stop(self, stopped: Sequence[Horizon]) -> None:
        """Cut no passes in some stacks from now on."""
        self.stacks = [horizon for horizon in self.stacks if horizon not in stopped]

    @property
    def reuse(self) -> bool:
        """Whether every second pass so far could have started at its lowest active block."""
        return not any(horizon.whole for horizon in self.stacks)

    @property
    def shares(self) -> bool:
        """Whether blocks of the last stack share more than a hidden state, see `Horizon`."""
        return any(horizon.shares for horizon in self.stacks if horizon.is_last)

    @property
    def kept_bytes(self) -> int:
        """Memory of the hidden states that are kept now."""
        return self.cache.kept_bytes

    @property
    def peak_bytes(self) -> int:
        """The most there ever was."""
        return self.cache.peak_bytes

    def release(self) -> None:
        """Forget that any hidden state is kept; the cached hidden states belong to the caller."""
        self.cache.release()
