r"""The perturbation $e(w) = \rho\, g / (\|g\|_2 + 10^{-12})$ and how it is put on a model.

A linear module's weight gets an additive branch: $W x$ becomes $W x + e x$, so no weight is modified and autograd
returns the gradient at $W + e$. Any other parameter is moved in place and put back bit for bit from a copy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

EPSILON = 1e-12  # in the denominator of e, arXiv 2602.09395


@dataclass(frozen=True, eq=False)
class Shift:
    """One parameter's part of e.

    Args:
        parameter (`nn.Parameter`): The parameter w.
        offset (`torch.Tensor`): e, of the parameter's shape, dtype and device.
        linear (`nn.Module` or `None`): The linear module whose weight it is, for an additive branch; `None`: in place.
    """

    parameter: nn.Parameter
    offset: torch.Tensor
    linear: nn.Module | None


def ascent_offsets(gradients: Sequence[torch.Tensor], norm: torch.Tensor, rho: float) -> list[torch.Tensor]:
    """Return e for each gradient: rho * g / (norm + 1e-12).

    Args:
        gradients (`Sequence[torch.Tensor]`): Ascent gradients g, any shapes and devices.
        norm (`torch.Tensor`): Their joint L2 norm, shape `()`, on any of the devices; not read by the host.
        rho (`float`): Radius.
    """
    factors = {norm.device: rho / (norm + EPSILON)}
    for gradient in gradients:
        if gradient.device not in factors:
            factors[gradient.device] = factors[norm.device].to(gradient.device)
    if len(factors) == 1:
        return list(torch._foreach_mul(list(gradients), factors[norm.device]))
    return [g * factors[g.device] for g in gradients]


class Firings:
    """Which linear modules ran as modules during a pass.

    TRL's fused head and PEFT's `target_parameters` read a weight without calling its module: there a hook never fires
    and an additive branch would be lost.
    """

    def __init__(self) -> None:
        self.fired: set[nn.Module] = set()

    @contextmanager
    def watch(self, linears: Sequence[nn.Module]) -> Iterator[None]:
        """Note which of `linears` run inside the context."""

        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if args:
                self.fired.add(module)

        self.fired.difference_update(linears)
        handles = [linear.register_forward_hook(hook) for linear in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def perturbed(shifts: Sequence[Shift]) -> Iterator[None]:
    """Run the context's forward and backward at w + e.

    The context must outlive the backward pass: gradient checkpointing recomputes through the branches.

    Args:
        shifts (`Sequence[Shift]`): The parameters that move. Whatever happens inside, the hooks are gone and the
            weights are w again, bit for bit, afterwards.
    """
    moved = [s for s in shifts if s.linear is None]
    handles = []
    try:
        for shift in shifts:
            if shift.linear is not None:
                handles.append(shift.linear.register_forward_hook(_branch(shift.offset)))
        with _moved([s.parameter for s in moved], [s.offset for s in moved]):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _branch(offset: torch.Tensor):
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        branch = F.linear(args[0], offset)
        return branch.add_(output) if branch.dtype == output.dtype else output + branch  # in place: one tensor less

    return hook


@contextmanager
def _moved(parameters: list[torch.Tensor], offsets: list[torch.Tensor]) -> Iterator[None]:
    if not parameters:
        yield
        return
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            torch._foreach_add_(parameters, offsets)
        torch.clear_autocast_cache()  # it may hold low-precision copies of what has just changed
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, saved)
        torch.clear_autocast_cache()
