"""Lets models compute in float64 throughout: many have norms and losses in float32 whatever their weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode


class Double(TorchFunctionMode):
    """Takes float32 for float64 wherever a function of torch is asked for it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.Tensor.backward, torch.autograd.backward):
            with self:  # what is checkpointed runs again inside
                return _backward(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_double, args), **{name: _double(value) for name, value in (kwargs or {}).items()})


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _backward(tensors: Any, grad_tensors: Any = None, **unused: Any) -> None:
    """Run a backward pass without asking for functions to take its place."""
    tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    grad_tensors = (None,) * len(tensors) if grad_tensors is None else grad_tensors
    ones = [torch.ones_like(t) if g is None else g for t, g in zip(tensors, grad_tensors, strict=True)]
    _engine_run_backward(tensors, tuple(ones), False, False, (), allow_unreachable=True, accumulate_grad=True)


@contextmanager
def in_double() -> Iterator[None]:
    """Compute in float64 inside the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            yield
    finally:
        torch.set_default_dtype(before)
