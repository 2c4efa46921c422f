r"""Passes at $w + e$: modules are handed $w + e$ in the place of $w$, which is never written.

A module reads its parameters from `module._parameters`. For a pass at $w + e$ that entry holds a tensor with the
values of $w + e$ whose gradient goes to $w$ itself. There is no extra product, nothing to put back but references,
hooks on $w$ fire, gradients of several micro-batches add up in `w.grad`, and an exception leaves $w$ untouched.

What is read in another way (a list of weights that a recurrent layer keeps, a fused kernel that was given the
parameter) does not see the swap. Then $w$ gets a gradient that did not come through it: `Passage` tells.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

# How much of a gradient may come from nowhere: what sums in another order round.
MORE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.03}


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


class Passage:
    """Sees which parameters' gradients come through tensors that stand in their place, and through nothing else.

    Attributes:
        read (`set[nn.Parameter]`): Parameters that a backward pass has reached that way.
    """

    def __init__(self) -> None:
        self.read: set[nn.Parameter] = set()
        self._sums: dict[nn.Parameter, torch.Tensor | None] = {}

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up what comes through to parameters, until the next call; they have no gradient now."""
        self._sums = dict.fromkeys(parameters)

    def see(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Take note of a gradient on its way to a parameter."""
        self.read.add(parameter)
        if parameter in self._sums:
            before = self._sums[parameter]
            self._sums[parameter] = gradient.detach() if before is None else before + gradient

    def missed(self) -> list[nn.Parameter]:
        """Return the watched parameters with a gradient of which not everything came through: they were read at w."""
        return [p for p, through in self._sums.items() if p.grad is not None and self._has_more(p, through)]

    def _has_more(self, parameter: nn.Parameter, through: torch.Tensor | None) -> bool:
        """Whether a parameter's gradient is more than what has come through; not known where hooks change it."""
        gradient = parameter.grad
        if gradient is None or through is None:
            return gradient is not None
        if parameter.is_meta or parameter._backward_hooks:
            return False
        rest, share = (gradient - through).norm(), MORE.get(gradient.dtype, MORE[torch.float32])
        return bool(rest > share * gradient.norm())


class Swap:
    """The weights w + e of one step, ready to stand in the place of w.

    Args:
        parameters (`Sequence[nn.Parameter]`): The parameters that move.
        offsets (`Sequence[torch.Tensor]`): e, each of its parameter's shape, dtype and device.
        sites (`Sites`): Where each of them is read, see `sites_of`; every parameter needs at least one place.

    Attributes:
        passage (`Passage`): What has come through it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], offsets: Sequence[torch.Tensor], sites: Sites) -> None:
        self.parameters = list(parameters)
        self.passage = Passage()
        self._entries: list[tuple[Site, torch.Tensor]] = []
        with torch.no_grad():
            moved = self._moved(offsets, sites)
        readable: dict[nn.Parameter, torch.Tensor] = {}
        for parameter in self.parameters:
            for site in sites[parameter]:
                if site.parameter not in readable:
                    readable[site.parameter] = _readable(site.parameter, moved[site.parameter], self.passage)
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


class _At(torch.autograd.Function):
    """The identity on w + e, whose gradient goes to w."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, moved: torch.Tensor, passage: Passage) -> torch.Tensor:
        ctx.parameter, ctx.passage = parameter, passage
        return moved.view_as(moved)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.passage.see(ctx.parameter, gradient)
        return gradient, None, None


def _readable(parameter: nn.Parameter, moved: torch.Tensor, passage: Passage) -> torch.Tensor:
    with torch.enable_grad():
        return _At.apply(parameter, moved, passage)


def _whole_storage(parameter: torch.Tensor) -> torch.Tensor:
    """Return a flat view of all that lies in a parameter's storage."""
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device).set_(parameter.untyped_storage())


def _same_view(storage: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return storage.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
