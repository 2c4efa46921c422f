"""Sees in a pass whether modules outside the blocks run before or behind them.

The order in which modules are registered does not tell: some heads are registered before the body that feeds them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from slsam_peft.algorithm.arms import Arm, Arms


class RunOrder:
    """Finds out for the arms whose depth is a guess whether they run behind the blocks.

    Args:
        arms (`Sequence[Arm]`): The arms; only those of a model (`Arms`) can be unsure.
    """

    def __init__(self, arms: Sequence[Arm]) -> None:
        self._arms = arms if isinstance(arms, Arms) else None
        self._behind: dict[nn.Module, bool] = {}

    @property
    def unsure(self) -> bool:
        """Whether there are such arms."""
        return self._arms is not None and bool(self._arms.unsure)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note, inside the context, which of their modules run behind the blocks."""
        if self._arms is None or not self._arms.unsure:
            yield
            return
        modules = [module for modules in self._arms.unsure.values() for module in modules]
        with watched_order(self._arms.all_blocks, modules) as behind:
            yield
        self._behind |= behind

    def settle(self) -> bool:
        """Set their depths by what has been seen so far, if anything has; return whether one has changed."""
        return self._arms is not None and bool(self._behind) and self._arms.confirm(self._behind)


@contextmanager
def watched_order(blocks: Sequence[nn.Module], modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, bool]]:
    """Note, inside the context, which of `modules` first run when a block has run already.

    Args:
        blocks (`Sequence[nn.Module]`): The blocks.
        modules (`Iterable[nn.Module]`): The modules in question.

    Yields:
        `dict[nn.Module, bool]`: By module, whether it runs behind the blocks; filled as they run. Modules that do not
            run are missing.
    """
    behind: dict[nn.Module, bool] = {}
    ran: list[nn.Module] = []

    def block_runs(module: nn.Module, args: tuple, output: Any) -> None:
        ran.append(module)

    def runs(module: nn.Module, args: tuple) -> None:
        behind.setdefault(module, bool(ran))

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(block_runs).remove)
        for module in modules:
            stack.callback(module.register_forward_pre_hook(runs).remove)
        yield behind
