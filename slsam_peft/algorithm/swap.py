r"""Passes at $w + e$: modules are handed $w + e$ in the place of $w$, which is never written.

A module reads its parameters from `module._parameters`. For a pass at $w + e$ that entry holds a tensor with the
values of $w + e$ whose gradient goes to $w$ itself. There is no extra product, nothing to put back but references,
hooks on $w$ fire, gradients of several micro-batches add up in `w.grad`, and an exception leaves $w$ untouched.

What is read in another way (a list of weights that a recurrent layer keeps, a fused kernel that was given the
parameter) does not see the swap. Then $w$ gets a gradient that did not come through it: `Swap.bypassed` tells.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn


class Site(NamedTuple):
    """One entry of a module's parameters.

    Args:
        module (`nn.Module`): The module.
        name (`str`): The parameter's name in it.
        parameter (`nn.Parameter`): What stands there at w.
    """

    module: nn.Module
    name: str
    parameter: nn.Parameter


Sites = Mapping[nn.Parameter, Sequence[Site]]


def sites_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, tuple[Site, ...]]:
    """Return for each parameter every place in the model that reads its storage.

    A parameter that several modules share has several places, and so have parameters that are views of one storage
    (PEFT ties the adapters of tied embeddings that way): they move together.

    Args:
        model (`nn.Module`): The model.
        parameters (`Sequence[nn.Parameter]`): The parameters that may be moved.
    """
    readers: dict[Any, list[Site]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                readers.setdefault(storage_key(parameter), []).append(Site(module, name, parameter))
    return {p: tuple(readers.get(storage_key(p), ())) for p in parameters}


def storage_key(parameter: torch.Tensor) -> Any:
    """Return what parameters on the same storage have in common; the parameter itself where it has no storage."""
    if parameter.is_meta or type(parameter) not in (nn.Parameter, torch.Tensor) or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.untyped_storage().data_ptr()


class Swap:
    """The weights w + e of one step, ready to stand in the place of w.

    Args:
        parameters (`Sequence[nn.Parameter]`): The parameters that move.
        offsets (`Sequence[torch.Tensor]`): e, each of its parameter's shape, dtype and device.
        sites (`Sites`): Where each of them is read, see `sites_of`; every parameter needs at least one place.

    Attributes:
        read (`set[nn.Parameter]`): Parameters that a backward pass has reached through the swap.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], offsets: Sequence[torch.Tensor], sites: Sites) -> None:
        self.parameters = list(parameters)
        self.read: set[nn.Parameter] = set()
        self._entries: list[tuple[Site, torch.Tensor]] = []
        with torch.no_grad():
            moved = self._moved(offsets, sites)
        readable: dict[nn.Parameter, torch.Tensor] = {}
        for parameter in self.parameters:
            for site in sites[parameter]:
                if site.parameter not in readable:
                    readable[site.parameter] = _readable(site.parameter, moved[site.parameter], self.read.add)
                    self._entries += [
                        (s, readable[site.parameter]) for s in sites[parameter] if s.parameter is site.parameter
                    ]

    def _moved(self, offsets: Sequence[torch.Tensor], sites: Sites) -> dict[nn.Parameter, torch.Tensor]:
        """Return w + e of every parameter that is read anywhere, those that only share a storage included."""
        together = [any(s.parameter is not p for s in sites[p]) for p in self.parameters]
        alone = [(p, e) for p, e, t in zip(self.parameters, offsets, together, strict=True) if not t]
        moved: dict[nn.Parameter, torch.Tensor] = {}
        if alone:
            weights, steps = map(list, zip(*alone, strict=True))
            moved = dict(zip(weights, torch._foreach_add([w.detach() for w in weights], steps), strict=True))
        copies: dict[Any, torch.Tensor] = {}
        for parameter, offset, shared in zip(self.parameters, offsets, together, strict=True):
            if shared:
                key = storage_key(parameter)
                if key not in copies:
                    copies[key] = _whole_storage(parameter).clone()
                    for site in sites[parameter]:
                        moved[site.parameter] = _same_view(copies[key], site.parameter)
                moved[parameter].add_(offset)
        return moved

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the context's forward and backward at w + e.

        The context must outlive the backward pass: gradient checkpointing reads the weights again there.
        """
        try:
            for site, tensor in self._entries:
                site.module._parameters[site.name] = tensor  # type: ignore[assignment]
            yield
        finally:
            for site, _ in self._entries:
                site.module._parameters[site.name] = site.parameter

    def bypassed(self) -> list[nn.Parameter]:
        """Return the parameters that have a gradient which did not come through the swap: they were read at w."""
        return [p for p in self.parameters if p.grad is not None and p not in self.read]


class _At(torch.autograd.Function):
    """The identity on w + e, whose gradient goes to w."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, moved: torch.Tensor, note: Callable[[Any], None]) -> torch.Tensor:
        ctx.parameter, ctx.note = parameter, note
        return moved.view_as(moved)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.note(ctx.parameter)
        return gradient, None, None


def _readable(parameter: nn.Parameter, moved: torch.Tensor, note: Callable[[Any], None]) -> torch.Tensor:
    with torch.enable_grad():
        return _At.apply(parameter, moved, note)


def _whole_storage(parameter: torch.Tensor) -> torch.Tensor:
    """Return a flat view of all that lies in a parameter's storage."""
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device).set_(parameter.untyped_storage())


def _same_view(storage: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return storage.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
