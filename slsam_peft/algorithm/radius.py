r"""Radii make the perturbation e of the ascent gradient g: how far it goes, and in which metric.

A radius is an object with one method, `offsets`. Another one is a class with that method; hand an instance to
`SLSAMConfig(radius=...)`. Nothing here is read by the host.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from slsam_peft.config import SLSAMConfig

EPSILON = 1e-12  # in the denominator of e, arXiv 2602.09395


class Offsets(NamedTuple):
    """A perturbation.

    Args:
        offsets (`list[torch.Tensor]`): e, one tensor per gradient, of its shape, dtype and device.
        rho (`torch.Tensor`): The length that was asked for, shape `()`; logged.
    """

    offsets: list[torch.Tensor]
    rho: torch.Tensor


class Radius(Protocol):
    """What makes e of g."""

    def offsets(
        self,
        gradients: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        norm: torch.Tensor,
        unit: torch.Tensor,
    ) -> Offsets:
        """Return the perturbation.

        Args:
            gradients (`Sequence[torch.Tensor]`): Ascent gradients of the perturbed parameters, any shapes and devices,
                as backpropagation left them: divided by the trainer's divisor, multiplied by a loss scale.
            weights (`Sequence[torch.Tensor]`): Those parameters at w.
            norm (`torch.Tensor`): Joint L2 norm of the gradients, shape `()`.
            unit (`torch.Tensor`): What the gradients are to be multiplied by to be those of the ascent sequences' mean
                loss, shape `()`.
        """
        ...


class AlongGradient(ABC):
    r"""A radius that goes along g itself: $e = \rho_t\, g / (\|g\|_2 + 10^{-12})$; subclasses state the length."""

    @abstractmethod
    def length(self, norm: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """Return how long e is to be, shape `()`; arguments as in `Radius.offsets`."""

    def offsets(
        self,
        gradients: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        norm: torch.Tensor,
        unit: torch.Tensor,
    ) -> Offsets:
        """Return the perturbation, see `Radius`."""
        rho = self.length(norm, unit)
        return Offsets(scaled(gradients, rho / (norm + EPSILON)), rho)


class Length(AlongGradient):
    r"""A fixed length: $e = \rho\, g / (\|g\|_2 + 10^{-12})$ (Foret et al. 2021; arXiv 2602.09395).

    Args:
        rho (`float`): The length.
    """

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def length(self, norm: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """Return it."""
        return torch.full_like(norm, self.rho)


class LossRise(AlongGradient):
    r"""A rise of the loss: $\rho_t = \min(\sigma / \|g\|, \rho_\text{max})$ (LE-SAM, arXiv 2605.10183).

    To first order e raises the ascent sequences' mean loss by $\sigma$, whatever the model, its adapters' rank and
    scale, and the phase of training: short steps while the loss is steep, longer ones once it is flat. $g$ is the
    gradient of that mean loss itself, whatever the trainer divides its loss by.

    Args:
        rise (`float`): sigma, in the unit of the loss (nats).
        longest (`float`): rho_max.
    """

    def __init__(self, rise: float, longest: float) -> None:
        self.rise = rise
        self.longest = longest

    def length(self, norm: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """Return what raises the loss so much, to first order."""
        return (self.rise / (norm * unit + EPSILON)).clamp(max=self.longest)


def scaled(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> list[torch.Tensor]:
    """Multiply gradients on any devices by a factor of shape `()` on one of them, without reading it."""
    factors = {factor.device: factor}
    for gradient in gradients:
        if gradient.device not in factors:
            factors[gradient.device] = factor.to(gradient.device)
    if len(factors) == 1:
        return list(torch._foreach_mul(list(gradients), factor))
    return [g * factors[g.device] for g in gradients]


def build_radius(config: SLSAMConfig) -> Radius:
    """Return the radius that `config.radius` names, or the object it is."""
    config = config.resolved
    if config.radius == "length":
        return Length(config.rho or 0.0)
    if config.radius == "loss_rise":
        return LossRise(config.loss_rise or 0.0, config.rho_max)
    return config.radius  # type: ignore[return-value]  # an object, as `SLSAMConfig` has checked
