"""A stack of blocks in which passes are cut, and what it has shown of itself."""

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.cut_pass import Cache
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.layout import Layout, Upper


class CutStack:
    """A stack of blocks in which passes are cut, and what they have shown of it.

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
        added (`set[int]`): Blocks that are given more than what the block below returns.
        watched (`dict[tuple[int, bool, bool], int]`): Forwards of a pass that was watched, by where it was cut.
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
        self.added: set[int] = set()
        self.watched: dict[tuple[int, bool, bool], int] = {}

    @property
    def here(self) -> str:
        """Where something happened, for messages; nothing where there is one stack."""
        return f" in {self.name}" if self.name else ""

    def upper(self, index: int) -> Upper:
        """Return what runs from the block at `index` on, later stacks included."""
        return self.layout.upper(self.offset + index)
