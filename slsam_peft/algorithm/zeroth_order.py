"""The zeroth-order ascent estimates its gradient from forward passes alone."""

from collections.abc import Sequence

import torch

from slsam_peft.algorithm.ascents import Host, Part, seeded_normal
from slsam_peft.algorithm.passes import PassRunner
from slsam_peft.algorithm.radius import scaled
from slsam_peft.algorithm.step import Closure, Pending, Step, added

SMOOTHING = 0.05  # length of the two probes; below about 0.02 a bfloat16 forward drowns it in rounding


class ZerothOrder(Part):
    r"""The ascent gradient from two forward passes along a random direction, without a backward pass (ZO-SAM).

    $$\hat g = \frac{L(w + \mu u) - L(w - \mu u)}{2 \mu}\, u$$

    with u uniform on the unit sphere of the drawn arms' parameters (arXiv 2603.13115, whose ascent step alone is of
    zeroth order, too). $d\, \hat g$, d being their number, is in the mean the gradient of the loss smoothed over a
    ball of radius $\mu$; $\hat g$ itself is the part of the gradient along u, so that its length is the slope there,
    which a loss rise needs. u comes from a seed: the config's and the number of the step. Nothing is kept.
    Differences: central differences on the ascent's own sequences, both passes with the same dropout.

    Args:
        sequences (`int`, *optional*): As in `Part`.
        fraction (`float`, *optional*): As in `Part`.
        smoothing (`float`, *optional*, defaults to `0.05`): mu, a length.
    """

    rule = "zeroth_order"
    forwards = 2

    def __init__(
        self, sequences: int | None = None, fraction: float | None = None, smoothing: float = SMOOTHING
    ) -> None:
        super().__init__(sequences, fraction)
        if not smoothing > 0:
            raise ValueError(f"smoothing={smoothing!r} is not allowed; it is a length > 0.")
        self.smoothing = smoothing

    def direction(self, parameters: Sequence[torch.Tensor], seed: int, step: int) -> list[torch.Tensor]:
        """Return u, one tensor per parameter; the same for the same parameters, seed and step."""
        made = seeded_normal(parameters, seed, step)
        lengths = torch._foreach_norm(made)
        whole = torch.stack([x.to(lengths[0].device, torch.float64) for x in lengths]).norm()
        return [x / whole.to(x) for x in made]

    def ascend(self, host: Host, runner: PassRunner, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        """See `Ascent.ascend`; the loss is the mean of the two probes: that at w to second order in their length."""
        forward = pending.forward_only
        if forward is None:
            raise ValueError(
                f"{self.setting} runs forward passes alone; pass forward_only, or an ascent_closure that runs the "
                "forward alone."
            )
        members = [i for i in runner.members(step.mask) if runner.parameters[i].requires_grad]
        along = self.direction([runner.parameters[i] for i in members], host.config.seed, host.steps)
        ahead, behind = (
            runner.probe(pending, forward, members, torch._foreach_mul(along, sign * self.smoothing))
            for sign in (1.0, -1.0)
        )
        slope, loss = (ahead - behind) / (2 * self.smoothing), (ahead + behind) / 2
        scale = host.loss_scale() if host.loss_scale is not None else None
        slope = slope if scale is None else slope * scale.reshape(()).to(slope.device)
        for i, part in zip(members, scaled(along, slope), strict=True):
            parameter = runner.parameters[i]
            parameter.grad = part.to(parameter) if parameter.grad is None else parameter.grad.add_(part)
        step.ascent_loss = added(step.ascent_loss, loss)
        return loss
