r"""Balances the norms of LoRA's factors, which is what SAM does to them, as weight decay does: beside a plain pass."""

import torch

from slsam_peft.algorithm.ascents import Ascent, Host, rate_of, strength_of
from slsam_peft.algorithm.factors import check_factors
from slsam_peft.algorithm.step import Step


class Balancing(Ascent):
    r"""BAR, balancedness-aware regularisation: no ascent, no second pass (Li, Zhang and He, NeurIPS 2024).

    Before the optimizer's step each drawn pair's factors become $(1 \pm \alpha_t \eta_t) A$ and
    $(1 \mp \alpha_t \eta_t) B$ (arXiv 2410.14802): under nBAR (algorithm 2) the one with the larger gradient grows, as
    the dynamics of SAM have it (theorem 2); under oBAR (algorithm 3) the smaller one grows. $\alpha_t$ falls linearly
    from $\mu_0$ to 0 where the length of the training is known, as one of the paper's schedules, and stays else. The
    gradient is the plain one, at w. Differences: none known.

    This is the one rule after which `SLSAM.update` leaves other weights than it found.

    Args:
        strength (`float`, *optional*): $\mu_0$; the paper tries 0.2 to 2. Defaults to the config's `rho`.
        by_gradients (`bool`, *optional*, defaults to `True`): nBAR; `False`: oBAR.
    """

    moves = False

    def __init__(self, strength: float | None = None, by_gradients: bool = True) -> None:
        self.strength = strength
        self.by_gradients = by_gradients
        self._host: Host | None = None

    @property
    def name(self) -> str:
        """How the settings call it."""
        return f"ascent={'bar' if self.by_gradients else 'obar'!r}"

    def begin(self, host: Host) -> None:
        """See `Ascent.begin`."""
        check_factors(self.name, host.arms, host.factors)
        self._mu = strength_of(self.strength, host, self.name)
        self._host = host

    def coefficient(self) -> float:
        """Return alpha of this step."""
        host = self._host
        assert host is not None
        return self._mu * (1.0 if host.progress is None else 1.0 - host.progress())

    def finish(self, step: Step) -> None:
        """Scale the factors of the drawn pairs whose gradients are there."""
        host = self._host
        assert host is not None
        drawn = {host.parameters[i] for i in host.members(step.mask)}
        alpha, rate = self.coefficient(), rate_of(host, self.name)
        pairs = [
            weights
            for factors in host.factors
            if drawn.issuperset(weights := factors.pair.weights) and all(w.grad is not None for w in weights)
        ]
        if not pairs:
            return
        with torch.no_grad():
            compared = [w.grad if self.by_gradients else w for pair in pairs for w in pair]
            norms = torch._foreach_norm([x for x in compared if x is not None])
            for k, (down, up) in enumerate(pairs):
                of_down, of_up = norms[2 * k], norms[2 * k + 1].to(norms[2 * k].device)
                grows = (of_down >= of_up) if self.by_gradients else (of_down < of_up)
                sign = torch.where(grows, 1.0, -1.0)
                down.mul_(1.0 + sign.to(down) * (alpha * rate(down)))
                up.mul_(1.0 - sign.to(up) * (alpha * rate(up)))
