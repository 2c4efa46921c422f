r"""Balances the norms of LoRA's factors, which is what SAM does to them, as weight decay does: beside a plain pass."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from slsam_peft.algorithm.ascents import Ascent, Host, rate_of, strength_of
from slsam_peft.algorithm.factors import check_factors
from slsam_peft.algorithm.norms import norms_of
from slsam_peft.algorithm.step import Step

LARGEST = 0.1  # change of a factor in one step; see `Balancing`


class Balancing(Ascent):
    r"""BAR, balancedness-aware regularisation: no ascent, no second pass (Li, Zhang and He, NeurIPS 2024).

    Before the optimizer's step each drawn pair's factors become $(1 \pm \alpha_t \eta_t) A$ and
    $(1 \mp \alpha_t \eta_t) B$ (arXiv 2410.14802): under nBAR (algorithm 2) the one with the larger gradient grows, as
    the dynamics of SAM have it (theorem 2); under oBAR (algorithm 3) the smaller one grows. $\alpha_t$ falls linearly
    from $\mu_0$ to 0 where the length of the training is known, as one of the paper's schedules, and stays else. The
    gradient is the plain one, at w. Differences: each factor has its own $\eta_t$, the paper's are all one; under the
    sampler a pair is drawn where both of its factors are.

    The rule is SAM's to first order in $\alpha_t \eta_t$, which is 0.002 at most with the paper's strengths and an
    adapter's rates. Above 0.1 it is refused: the second order is a hundredth there, and ten steps take $B$ and $A$ a
    factor of 7 apart. What asks for that is a rate that is none, as Prodigy's 1. Factors in half precision cannot be
    changed by so little, two numbers of bfloat16 being 0.004 apart or more: what rounding leaves of each change is
    kept, and comes with the next one.

    This is the one rule after which `SLSAM.update` leaves other weights than it found.

    Args:
        strength (`float`, *optional*): $\mu_0$; the paper tries 0.2 to 2. Defaults to the config's `rho`.
        by_gradients (`bool`, *optional*, defaults to `True`): nBAR; `False`: oBAR.
    """

    moves = False
    paced = True

    def __init__(self, strength: float | None = None, by_gradients: bool = True) -> None:
        self.strength = strength
        self.by_gradients = by_gradients
        self._host: Host | None = None
        self._rest: dict[nn.Parameter, torch.Tensor] = {}  # of factors in half precision: what rounding has left

    @property
    def rule(self) -> str:
        """What the settings call it, by what it compares."""
        return "bar" if self.by_gradients else "obar"

    def begin(self, host: Host) -> None:
        """See `Ascent.begin`."""
        check_factors(self.setting, host.arms, host.factors)
        self._mu = strength_of(self, host)
        self._host = host
        self._rest = {}

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
        alpha, rate = self.coefficient(), rate_of(host, self.setting)
        pairs = [
            weights
            for factors in host.factors
            if drawn.issuperset(weights := factors.pair.weights) and all(w.grad is not None for w in weights)
        ]
        if not pairs:
            return
        changes = [[self._checked(alpha, rate(w)) for w in pair] for pair in pairs]
        with torch.no_grad():
            compared = [w.grad if self.by_gradients else w for pair in pairs for w in pair]
            norms = norms_of([x for x in compared if x is not None])
            for k, (down, up) in enumerate(pairs):
                of_down, of_up = norms[2 * k], norms[2 * k + 1].to(norms[2 * k].device)
                grows = (of_down >= of_up) if self.by_gradients else (of_down < of_up)
                sign = torch.where(grows, 1.0, -1.0)
                self._scale(down, sign, changes[k][0])
                self._scale(up, -sign, changes[k][1])

    def _checked(self, alpha: float, rate: float) -> float:
        """Return by which share of itself a factor is to change, and refuse one beyond all reason."""
        if alpha * rate > LARGEST:
            raise ValueError(
                f"{self.setting} would change a factor by {alpha * rate:.3g} of itself in one step (alpha {alpha:.3g} "
                f"times the learning rate {rate:.3g}); at most {LARGEST} is allowed. Lower rho, or use an optimizer "
                "whose learning rate is the length of its steps (Prodigy's and D-Adaptation's 1 is not)."
            )
        return alpha * rate

    def _scale(self, weight: nn.Parameter, sign: torch.Tensor, change: float) -> None:
        """Let a factor grow or shrink by a share of itself, as the sign says; keep what its dtype rounds away."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        factor = 1.0 + sign.to(weight.device, exact) * change
        if exact == weight.dtype:
            weight.mul_(factor)
            return
        whole = weight.to(exact)
        if weight in self._rest:
            whole += self._rest[weight]
        weight.copy_(whole.mul_(factor))
        self._rest[weight] = whole.sub_(weight)

    def kept_bytes(self, parameters: Sequence[nn.Parameter]) -> float:
        """Return the bytes of what rounding leaves: a float32 number for each of a factor in half precision."""
        return float(sum(4 * p.numel() for p in parameters if p.element_size() < 4))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what rounding has left of factors in half precision, see `Ascent.state_dict`."""
        return {key: self._rest[w].clone() for key, w in self._named().items() if w in self._rest}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, see `Ascent.load_state_dict`."""
        named = self._named()
        wrong = [key for key, x in state.items() if key not in named or named[key].shape != x.shape]
        if wrong:
            raise ValueError(
                f"the state holds {wrong[0]!r}, and no factor here has that name and shape. Resume with the adapter "
                "that it was saved for, or start without the state."
            )
        self._rest = {named[key]: x.to(named[key].device, copy=True) for key, x in state.items()}

    def _named(self) -> dict[str, nn.Parameter]:
        """Return the factors by the names that a state has for them."""
        pairs = () if self._host is None else self._host.factors
        return {f"{i}.{side}": w for i, factors in enumerate(pairs) for side, w in enumerate(factors.pair.weights)}
