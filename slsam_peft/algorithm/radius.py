r"""Radii make the perturbation e of the ascent gradient g: how far it goes, and in which metric.

A radius is an object with one method, `offsets`. Another one is a class with that method; hand an instance to
`SLSAMConfig(radius=...)`. Nothing here is read by the host. `rule` is what the settings call a class, where they have
a name for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from slsam_peft.algorithm.factors import Factors
from slsam_peft.algorithm.norms import joint_norm
from slsam_peft.config import SLSAMConfig

EPSILON = 1e-12  # in the denominator of e, arXiv 2602.09395
ETA = 0.01  # ASAM's, arXiv 2102.11600
ROOT_STEPS = 24  # each leaves a small share of what was missing, unless the pair's two changes cancel one another


class Offsets(NamedTuple):
    """A perturbation.

    Args:
        offsets (`list[torch.Tensor]`): e, one tensor per gradient, of its shape, dtype and device.
        rho (`torch.Tensor`): The length that was asked for, in the radius's own metric, shape `()`; logged.
    """

    offsets: list[torch.Tensor]
    rho: torch.Tensor


class Radius(Protocol):
    """What makes e of g.

    One that keeps something from step to step has `state_dict` and `load_state_dict`, too, as `Ascent` has them: a
    checkpoint then holds it, and a step that is aborted or skipped leaves it as it was. What it keeps is not to lie
    under the names of its constructor's parameters: by these a checkpoint tells settings apart.
    """

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
            weights (`Sequence[torch.Tensor]`): Those parameters themselves, at w; no graph is being built.
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
        rho = self.length(norm, unit) * (norm > 0)  # where there is no gradient, there is no e
        return Offsets(scaled(gradients, rho / (norm + EPSILON)), rho)


class Length(AlongGradient):
    r"""A fixed length: $e = \rho\, g / (\|g\|_2 + 10^{-12})$ (Foret et al. 2021; arXiv 2602.09395).

    Args:
        rho (`float`): The length.
    """

    rule = "length"

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

    rule = "loss_rise"

    def __init__(self, rise: float, longest: float) -> None:
        self.rise = rise
        self.longest = longest

    def length(self, norm: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """Return what raises the loss so much, to first order."""
        return (self.rise / (norm * unit + EPSILON)).clamp(max=self.longest)


class Scaled(ABC):
    r"""A radius in units of the weights: $e = \rho\, T_w^2 g / \|T_w g\|_2$, so that $\|T_w^{-1} e\|_2 = \rho$.

    Subclasses state $T_w$. Where all of $T_w g$ is 0, e is 0.

    Args:
        rho (`float`): The length in those units.
        eta (`float`, *optional*, defaults to `0.01`): Added to $T_w$, so that what is 0 (LoRA's $B$ when training
            starts) moves too.
    """

    def __init__(self, rho: float, eta: float = ETA) -> None:
        self.rho = rho
        self.eta = eta

    @abstractmethod
    def sizes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the sizes of a weight's entries, of a shape that broadcasts to its own."""

    def offsets(
        self,
        gradients: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        norm: torch.Tensor,
        unit: torch.Tensor,
    ) -> Offsets:
        """Return the perturbation, see `Radius`."""
        metric = [self.sizes(w.detach()) + self.eta for w in weights]
        once = [t * g for t, g in zip(metric, gradients, strict=True)]
        size = joint_norm(once, norm.device)
        twice = [t * g for t, g in zip(metric, once, strict=True)]
        rho = torch.full_like(norm, self.rho) * (size > 0)  # where nothing is moved, the length is none
        return Offsets(scaled(twice, rho / (size + EPSILON)), rho)


class Adaptive(Scaled):
    r"""Element by element: $T_w = |w| + \eta$ (ASAM, Kwon et al., ICML 2021, arXiv 2102.11600, section 4).

    With $\eta = 0$ a step does not depend on how a product is split: $A \to cA$, $B \to B/c$ moves $BA$ alike. The
    paper's $\rho$ and $\eta$ are 0.5 and 0.01 on CIFAR. Here biases are scaled as weights are.
    """

    rule = "asam"

    def sizes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the absolute values."""
        return weight.abs()


class Neuron(Scaled):
    r"""Neuron by neuron: $T_w$ is the L2 norm of a neuron's weights (FT-SAM, Zhu et al., ICCV 2023, arXiv 2304.11823).

    A neuron is a row of a weight: an output of $B$, a component of the rank of $A$; of a vector, an entry. So neurons
    with large weights, which backdoors tend to have, are moved farthest. $\eta$ is not in the paper, whose weights are
    never 0; ASAM's is used.
    """

    rule = "neuron"

    def sizes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the norms of the rows, shape `(rows, 1, ...)`; the absolute values of a vector."""
        if weight.dim() < 2:
            return weight.abs()
        return weight.flatten(1).norm(dim=1).reshape(-1, *(1,) * (weight.dim() - 1))


class WeightSpace:
    r"""A radius in the space of the adapted weights: e lies along g, and $s\,BA$ changes by $\rho$ in Frobenius norm.

    Over all perturbed pairs together, with $d$ the direction of g and $e = t\,d$,

    $$\Delta(t) = t\,s\,(B\,d_A + d_B\,A) + t^2 s\,d_B\,d_A, \qquad \|\Delta(t)\|_F = \rho,$$

    whose norm follows from the Gram matrices of $[B, d_B]$ and $[A; d_A]$, both $2r \times 2r$; no weight is made. How
    far e goes does not depend on how a product is split over more ranks, nor on what part of it alpha is. The smallest
    such t is approached from below, so $\rho$ is never exceeded. Ours; EFlat-LoRA (arXiv 2508.00522) has a radius in
    the weights as well. The matrices are summed in float64: the change may be far shorter than what it is a sum of.

    Args:
        rho (`float`): The Frobenius norm of the change.
        factors (`Sequence[Factors]`): The pairs that the perturbed parameters belong to.
    """

    rule = "weight"

    def __init__(self, rho: float, factors: Sequence[Factors]) -> None:
        self.rho = rho
        self._place = {w: (i, side) for i, f in enumerate(factors) for side, w in enumerate(f.pair.weights)}
        self._factors = factors

    def offsets(
        self,
        gradients: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        norm: torch.Tensor,
        unit: torch.Tensor,
    ) -> Offsets:
        """Return the perturbation, see `Radius`."""
        directions = scaled(gradients, 1.0 / (norm + EPSILON))
        found: dict[int, list[torch.Tensor | None]] = {}
        for weight, direction in zip(weights, directions, strict=True):
            pair, side = self._place[weight]  # type: ignore[index]  # the parameter itself
            found.setdefault(pair, [None, None])[side] = direction
        sums = torch.stack([self._gram(i, *sides).to(norm.device) for i, sides in found.items()]).sum(0)
        length = _smallest_root(sums.unbind(), self.rho).to(norm.dtype)
        return Offsets(scaled(directions, length), torch.full_like(norm, self.rho) * (length > 0))

    def _gram(self, pair: int, down: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor:
        """Return |X|^2, the product of X and Y, and |Y|^2 of a pair's change t X + t^2 Y, float64, shape `(3,)`."""
        factors = self._factors[pair]
        a, b = (w.detach().double() for w in factors.pair.weights)
        da = torch.zeros_like(a) if down is None else down.double()
        db = torch.zeros_like(b) if up is None else up.double()
        left, right = torch.cat([b, db], dim=1), torch.cat([a, da])
        of_b, of_a, r = left.t() @ left, right @ right.t(), b.shape[1]
        bb, bd, dd = of_b[:r, :r], of_b[:r, r:], of_b[r:, r:]
        aa, ad, ee = of_a[:r, :r], of_a[:r, r:], of_a[r:, r:]
        linear = (bb * ee).sum() + 2 * (bd * ad.t()).sum() + (dd * aa).sum()
        mixed = (bd * ee).sum() + (dd * ad).sum()
        return factors.scale**2 * torch.stack([linear, mixed, (dd * ee).sum()])


def _smallest_root(sums: Sequence[torch.Tensor], rho: float) -> torch.Tensor:
    r"""Return the smallest t > 0 with $\|tX + t^2 Y\| = \rho$, from below, without reading anything; shape `()`.

    From where t stands the norm grows by at most $d\,\|X + 2tY\| + d^2\,\|Y\|$ over a step d, so the step that fills
    what is missing by that bound never goes too far.
    """
    xx, xy, yy = sums
    t = torch.zeros_like(xx)
    bend = yy.clamp(min=0.0).sqrt()
    for _ in range(ROOT_STEPS):
        reached = (t.square() * (xx + 2 * t * xy + t.square() * yy)).clamp(min=0.0).sqrt()
        missing = (rho - reached).clamp(min=0.0)
        slope = (xx + 4 * t * xy + 4 * t.square() * yy).clamp(min=0.0).sqrt()
        below = slope + (slope.square() + 4 * bend * missing).sqrt()
        t = t + torch.where(below > 0, 2 * missing / below, 0.0)  # nothing moves where g is 0
    return t


def slope_of(
    radius: Radius, offsets: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], device: torch.device
) -> torch.Tensor | None:
    """Return the product of e and the gradients, to first order what e raises the loss by, shape `()`.

    `None` where it is rho times their norm: where e lies along them and rho is its length.

    Args:
        radius (`Radius`): What has made e.
        offsets (`Sequence[torch.Tensor]`): e.
        gradients (`Sequence[torch.Tensor]`): What it was made of.
        device (`torch.device`): Where the result lies.
    """
    if isinstance(radius, AlongGradient):
        return None
    return torch.stack([(e * g).sum().to(device) for e, g in zip(offsets, gradients, strict=True)]).sum()


def scaled(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> list[torch.Tensor]:
    """Multiply gradients on any devices by a factor of shape `()` on one of them, without reading it."""
    factors = {factor.device: factor}
    for gradient in gradients:
        if gradient.device not in factors:
            factors[gradient.device] = factor.to(gradient.device)
    if len(factors) == 1:
        return list(torch._foreach_mul(list(gradients), factor))
    return [g * factors[g.device] for g in gradients]


def build_radius(config: SLSAMConfig, factors: Sequence[Factors] = ()) -> Radius:
    """Return the radius that `config.radius` names, or the object it is.

    Args:
        config (`SLSAMConfig`): Read: `radius`, and the number that belongs to it.
        factors (`Sequence[Factors]`, *optional*, defaults to `()`): The model's low-rank pairs, for `"weight"`.
    """
    config = config.resolved
    if not isinstance(config.radius, str):
        return config.radius  # type: ignore[return-value]  # an object, as `SLSAMConfig` has checked
    if config.radius == "loss_rise":
        return LossRise(config.loss_rise or 0.0, config.rho_max)
    rho = config.rho or 0.0
    if config.radius == "weight":
        return WeightSpace(rho, factors)
    return {kind.rule: kind for kind in (Length, Adaptive, Neuron)}[config.radius](rho)
