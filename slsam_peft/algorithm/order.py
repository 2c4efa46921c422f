"""Sees in a pass whether modules outside the blocks run before or behind them.

The order in which modules are registered does not tell: some heads are registered before the body that feeds them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


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
