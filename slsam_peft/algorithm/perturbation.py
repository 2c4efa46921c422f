r"""Makes the perturbation $e(w) = \rho\, g / (\|g\|_2 + 10^{-12})$ and puts it on a model.

A linear module's weight gets an additive branch: $W x$ becomes $W x + e x$, so no weight is modified and autograd
returns the gradient at $W + e$. Any other parameter is moved in place and put back bit for bit from a copy. Where the
last sequences of a batch are to see w instead, linear modules take W + e and W: each sequence is on its own there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

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


@contextmanager
def split(
    linears: Sequence[nn.Module],
    first: Sequence[torch.Tensor],
    last: Sequence[torch.Tensor],
    sequences: tuple[int, int],
) -> Iterator[None]:
    """Run linear modules on the first sequences of a batch with some weights, and on the last ones with others.

    Together they cost what one weight costs on all of them. As with `perturbed`, the context must outlive the backward
    pass, and no weight is modified.

    Args:
        linears (`Sequence[nn.Module]`): The modules; their own weights are not used and get no gradient.
        first (`Sequence[torch.Tensor]`): Weights for the first sequences.
        last (`Sequence[torch.Tensor]`): Weights for the last sequences.
        sequences (`tuple[int, int]`): How many sequences come first and last; they are the modules' first dimension.

    Raises:
        ValueError: a module runs on something else than these sequences; raised by the forward pass.
    """
    try:
        for linear, *weights in zip(linears, first, last, strict=True):
            # A hook would come too late: W x itself is not wanted.
            linear.forward = partial(_split_forward, linear, weights, sequences)
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def _split_forward(
    linear: Any, weights: Sequence[torch.Tensor], sequences: tuple[int, int], input: torch.Tensor
) -> torch.Tensor:
    if input.shape[0] != sum(sequences):
        raise ValueError(
            f"an adapter ran on a tensor of shape {tuple(input.shape)} where sequences={sequences} are "
            f"{sum(sequences)} sequences. Experts do, and models that flatten their batch; sequences cannot be told "
            "apart there, so use ascent='partial'."
        )
    parts = zip(input.split(sequences), weights, strict=True)
    return torch.cat([F.linear(part, weight, linear.bias) for part, weight in parts])


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
