"""What a pass may not do when it is cut at a floor: feed the blocks on something trained, other than their input.

A cut drops the gradient of whatever enters below it. Two kinds of model have such a thing, and show it only when they
run: one that runs its stack more than once, on its own output, and one whose blocks are fed from the side by a module
that lies behind them in the order of definition (a projector of images).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

REENTRANT = "CheckpointFunctionBackward"  # hides what it has run


class LeakyStackError(RuntimeError):
    """A pass that was cut would have dropped part of the gradient. Raised in the forward, before anything is lost."""


@contextmanager
def watched(blocks: Sequence[nn.Module], above: Sequence[nn.Module]) -> Iterator[None]:
    """Run a pass; stop it where the blocks turn out to be fed on something trained.

    Args:
        blocks (`Sequence[nn.Module]`): The stack, lowest first.
        above (`Sequence[nn.Module]`): Modules with trained parameters that are taken to run after it.

    Raises:
        LeakyStackError: one of `above` runs before the stack, or the stack is entered with its own output.
    """
    has_run = False

    def ran(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal has_run
        has_run = True

    def entered(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not has_run:
            return
        trained = {p for part in (*blocks, *above) for p in part.parameters() if p.requires_grad}
        if _depends_on(args[0] if args else kwargs["hidden_states"], trained):
            raise LeakyStackError("the blocks are run on their own output")

    def early(module: nn.Module, args: tuple) -> None:
        if not has_run:
            raise LeakyStackError(f"a trained {type(module).__name__} outside the blocks runs before them")

    with ExitStack() as stack:
        for handle in (
            blocks[-1].register_forward_hook(ran),
            blocks[0].register_forward_pre_hook(entered, with_kwargs=True, prepend=True),
            *(module.register_forward_pre_hook(early) for module in above),
        ):
            stack.callback(handle.remove)
        yield


def _depends_on(tensor: torch.Tensor, parameters: set[nn.Parameter]) -> bool:
    """Whether the graph of a tensor holds one of the parameters. What enters a stack has a graph of few nodes."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) in parameters or node.name() == REENTRANT:
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False
