r"""The bandit keeps inclusion probabilities and learns them from the arms that were drawn.

Everything here is small, float64 and on the CPU. Symbols: $L$ arms, budget $B = s L$ = sum of the probabilities,
$p$ inclusion probabilities, $a$ norms of the arms' ascent gradients; all vectors have shape `(L,)`.
"""

from collections.abc import Callable
from typing import Any

import torch

from slsam_peft.algorithm.projection import project, project_with_min_probability
from slsam_peft.config import SLSAMConfig

PAPER_ALPHA = 0.001  # alpha, arXiv 2602.09395
PAPER_P_MIN = 0.001  # p_min in the paper's cost estimate
PAPER_CLIP = (1e-8, 1.0)
SCALE_DECAY = 0.99  # per step: follows gradients that shrink during a training within some hundred steps

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def paper_update(p: torch.Tensor, mask: torch.Tensor, norms: torch.Tensor, budget: float) -> torch.Tensor:
    r"""Return the probabilities after the paper's EXP3-type update (arXiv 2602.09395).

    $c_l = (A / p_\text{min})^2 - (a_l / p_l)^2$ for active arms, $A$ the largest norm, the smallest $c$ taken off;
    $w_l = p_l \exp(-\alpha c_l / p_l)$; projection onto the budget; clip to $[10^{-8}, 1]$.

    Args:
        p (`torch.Tensor`): Probabilities before the update, shape `(L,)`.
        mask (`torch.Tensor`): Active arms, boolean, shape `(L,)`.
        norms (`torch.Tensor`): Norms $a$; only the active entries are read.
        budget (`float`): Sum of the probabilities.

    Returns:
        `torch.Tensor`: Probabilities, shape `(L,)`.
    """
    p_active, a = p[mask], norms[mask]
    cost = (a.max() / PAPER_P_MIN) ** 2 - (a / p_active) ** 2
    cost = cost - cost.min()
    weights = p.clone()
    weights[mask] = p_active * torch.exp(-PAPER_ALPHA * cost / p_active)
    return project(weights, budget).clamp(*PAPER_CLIP)


class Bandit:
    r"""Inclusion probabilities with the rule that updates them.

    `"paper"` is `paper_update`. `"scale_free"` keeps the paper's aim, probabilities in proportion to the norms, which
    minimise $\sum_l a_l^2 / p_l$, and drops its units: with $r_l = a_l / p_l$ and $R$ the largest $r$ seen (decaying
    by 1 % per step), an active arm's weight is $p_l \exp(\eta\, s\, (r_l / R)^2 / q_l)$, $q_l$ its realised inclusion
    probability, and the projection holds every $p_l$ above `min_probability` * s. Multiplying all norms by a
    constant changes nothing.

    Args:
        count (`int`): Number of arms $L$.
        budget (`float`): Sum of the probabilities, in (0, L].
        config (`SLSAMConfig`): Read: `bandit`, `bandit_rate`, `min_probability`.

    Attributes:
        probabilities (`torch.Tensor`): Current $p$, float64 on the CPU, shape `(L,)`; $B / L$ each at the start.
    """

    def __init__(self, count: int, budget: float, config: SLSAMConfig) -> None:
        self.budget = budget
        self.rate = config.bandit_rate
        self.rule: Any = config.bandit
        self._min_share = config.min_probability
        self.probabilities = torch.full((count,), budget / count, dtype=torch.float64)
        self._scale = torch.zeros((), dtype=torch.float64)

    @property
    def mean(self) -> float:
        """Mean probability, the expected share of active arms."""
        return self.budget / len(self.probabilities)

    @property
    def minimum(self) -> float:
        """Least probability that `"scale_free"` leaves an arm."""
        return self._min_share * self.mean

    def update(self, mask: torch.Tensor, norms: torch.Tensor, inclusion: torch.Tensor) -> None:
        """Learn from one step.

        Args:
            mask (`torch.Tensor`): Arms whose norms were seen, boolean, shape `(L,)`; at least one.
            norms (`torch.Tensor`): Their gradient norms, finite, float64, shape `(L,)`.
            inclusion (`torch.Tensor`): Inclusion probabilities that the sampling scheme realises, shape `(L,)`.

        Raises:
            ValueError: a callable rule returned something other than `L` probabilities in [0, 1].
        """
        if self.mean == 1.0 or self.rule == "uniform":
            return
        if self.rule == "paper":
            self.probabilities = paper_update(self.probabilities, mask, norms, self.budget)
        elif self.rule == "scale_free":
            self._scale_free(mask, norms, inclusion)
        else:
            self.probabilities = self._checked(self.rule(self.probabilities.clone(), mask, norms, inclusion))

    def _scale_free(self, mask: torch.Tensor, norms: torch.Tensor, inclusion: torch.Tensor) -> None:
        p = self.probabilities
        ratio = norms[mask] / p[mask]
        scale = torch.maximum(SCALE_DECAY * self._scale, ratio.max())
        if scale == 0:  # no arm has a gradient: nothing to learn from
            return
        weights = p.clone()
        weights[mask] = p[mask] * torch.exp(self.rate * self.mean * (ratio / scale) ** 2 / inclusion[mask])
        self.probabilities = project_with_min_probability(weights, self.budget, self.minimum)
        self._scale = scale

    def _checked(self, probabilities: Any) -> torch.Tensor:
        try:
            p = torch.as_tensor(probabilities, dtype=torch.float64).detach().cpu()
            fits = p.shape == self.probabilities.shape and bool(((p >= 0) & (p <= 1)).all() and p.any())
        except (TypeError, ValueError, RuntimeError):  # what torch raises for what is no tensor
            fits = False
        if not fits:
            raise ValueError(
                f"the bandit rule returned {probabilities!r}; it must return {len(self.probabilities)} probabilities "
                "in [0, 1], not all 0."
            )
        return p

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return everything later steps depend on."""
        return {
            "probabilities": self.probabilities.clone(),
            "scale": self._scale.clone(),
            "budget": torch.tensor(self.budget, dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.probabilities = self._checked(state["probabilities"].clone())
        self.budget = float(state["budget"])
        self._scale = state["scale"].to(torch.float64).clone()
