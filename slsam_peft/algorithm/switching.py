"""Switches parameters off for a pass, so that it builds no graph for them, and keeps them off."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def switched_off(idle: Iterable[nn.Parameter], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Switch parameters off inside the context; those that are off already stay off.

    They stay off whatever the loss does: a loss that switches adapters (DPO's reference pass) has PEFT turn every
    factor on again, and a checkpointed block would then be recomputed with another graph than it was run with.

    Args:
        idle (`Iterable[nn.Parameter]`): Those to switch off.
        parameters (`Iterable[nn.Parameter]`): All there are; those that are off now are not to be turned on either.
    """
    off = [p for p in idle if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad and "requires_grad_" not in vars(p)]
    try:
        for parameter in off:
            parameter.requires_grad_(False)
        for parameter in (*off, *frozen):
            _ignore_requires_grad_(parameter)
        yield
    finally:
        for parameter in (*off, *frozen):
            _heed_requires_grad_(parameter)
        for parameter in off:
            parameter.requires_grad_(True)


def _ignore_requires_grad_(parameter: nn.Parameter) -> None:
    """Let `parameter.requires_grad_(...)` change nothing: an attribute of the instance hides the class's method."""

    def unchanged(requires_grad: bool = True) -> nn.Parameter:
        return parameter

    vars(parameter)["requires_grad_"] = unchanged


def _heed_requires_grad_(parameter: nn.Parameter) -> None:
    """Undo `_ignore_requires_grad_`."""
    vars(parameter).pop("requires_grad_", None)
