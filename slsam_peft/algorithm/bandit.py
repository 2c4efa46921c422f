r"""The bandit keeps inclusion probabilities and learns them from the arms whose gradient norms were seen.

Everything here is small, float64 and on the CPU. Symbols: $L$ arms, budget $B = s L$ = sum of the probabilities,
$p$ inclusion probabilities, $a$ norms of the arms' gradients; all vectors have shape `(L,)`.

A step's arms may have been drawn before the bandit learned from the step before it. Estimates such as $a_l / p_l$
then take the probabilities that the arms were drawn with; what is moved are the current ones.
"""

from collections.abc import Callable
from typing import Any

import torch

from slsam_peft.algorithm.given import load_own_state, own_state
from slsam_peft.algorithm.projection import project, project_with_min_probability
from slsam_peft.config import SLSAMConfig

PAPER_ALPHA = 0.001  # alpha, arXiv 2602.09395
PAPER_P_MIN = 0.001  # p_min in the paper's cost estimate
PAPER_CLIP = (1e-8, 1.0)
SCALE_DECAY = 0.99  # per step: follows gradients that shrink during a training within some hundred steps
SQUARES_DECAY = 0.96  # per step: a mean over about 25 steps; 0.95 to 0.97 did alike on norms of a real training
OWN = "rule."  # before the keys of a state that a user's rule keeps
LEAST_WEIGHT = 1e-6  # of the largest, so that arms without a gradient still take part in the projection

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def paper_update(
    p: torch.Tensor, mask: torch.Tensor, norms: torch.Tensor, budget: float, drawn: torch.Tensor
) -> torch.Tensor:
    r"""Return the probabilities after the paper's EXP3-type update (arXiv 2602.09395).

    $c_l = (A / p_\text{min})^2 - (a_l / p_l)^2$ for active arms, $A$ the largest norm, the smallest $c$ taken off;
    $w_l = p_l \exp(-\alpha c_l / p_l)$; projection onto the budget; clip to $[10^{-8}, 1]$. The $p_l$ that divide are
    those that the arms were drawn with.

    Args:
        p (`torch.Tensor`): Probabilities before the update, shape `(L,)`.
        mask (`torch.Tensor`): Active arms, boolean, shape `(L,)`.
        norms (`torch.Tensor`): Norms $a$; only the active entries are read.
        budget (`float`): Sum of the probabilities.
        drawn (`torch.Tensor`): Probabilities that the arms were drawn with, shape `(L,)`.

    Returns:
        `torch.Tensor`: Probabilities, shape `(L,)`.
    """
    p_drawn, a = drawn[mask], norms[mask]
    cost = (a.max() / PAPER_P_MIN) ** 2 - (a / p_drawn) ** 2
    cost = cost - cost.min()
    weights = p.clone()
    weights[mask] = p[mask] * torch.exp(-PAPER_ALPHA * cost / p_drawn)
    return project(weights, budget).clamp(*PAPER_CLIP)


class Bandit:
    r"""Inclusion probabilities with the rule that updates them.

    `"paper"` is `paper_update`. `"scale_free"` keeps the paper's aim, probabilities in proportion to the norms, which
    minimise $\sum_l a_l^2 / p_l$, and drops its units: with $r_l = a_l / p_l$ and $R$ the largest $r$ seen (decaying
    by 1 % per step), an active arm's weight is $p_l \exp(\eta\, s\, (r_l / R)^2 / q_l)$, $q_l$ its realised inclusion
    probability, and the projection holds every $p_l$ above `min_probability` * s. Multiplying all norms by a
    constant changes nothing.

    Where every arm is trained all norms are seen in every step, whichever arms were drawn. With this full information
    nothing has to be estimated: `"scale_free"` keeps an exponentially weighted mean of $a_l^2 / \|a\|$ and takes $p_l$
    in proportion to its root, projected likewise. Without the divisor that would minimise $\sum_l a_l^2 / p_l$ over
    the last steps; with it a step whose gradient is ten times as long counts ten times and not a hundred times as
    much, or else one odd batch would decide which arms the next 25 steps draw.

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
        self.rule: Any = config.resolved.bandit
        self._min_share = config.min_probability
        self.probabilities = torch.full((count,), budget / count, dtype=torch.float64)
        self._scale = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros(count, dtype=torch.float64)

    @property
    def mean(self) -> float:
        """Mean probability, the expected share of active arms."""
        return self.budget / len(self.probabilities)

    @property
    def minimum(self) -> float:
        """Least probability that `"scale_free"` leaves an arm."""
        return self._min_share * self.mean

    def update(
        self,
        mask: torch.Tensor,
        norms: torch.Tensor,
        inclusion: torch.Tensor,
        drawn: torch.Tensor | None = None,
    ) -> None:
        """Learn from one step.

        Args:
            mask (`torch.Tensor`): Arms whose norms were seen, boolean, shape `(L,)`; at least one.
            norms (`torch.Tensor`): Their gradient norms, finite, float64, shape `(L,)`.
            inclusion (`torch.Tensor`): Probabilities that an arm's norm is seen, shape `(L,)`: what the sampling
                scheme realises, or all 1 where every norm is seen in every step (full information).
            drawn (`torch.Tensor`, *optional*): Probabilities that the scheme was given, shape `(L,)`; the current ones
                where the arms were not drawn early. A callable rule gets the current ones, which it is to move, and
                `inclusion`, which belongs to the draw.

        Raises:
            ValueError: a callable rule returned something other than `L` probabilities in [0, 1].
        """
        if self.mean == 1.0 or self.rule == "uniform":
            return
        p = self.probabilities
        drawn = p if drawn is None else drawn
        if self.rule == "paper":
            self.probabilities = paper_update(p, mask, norms, self.budget, drawn)
        elif self.rule != "scale_free":
            self.probabilities = self._checked(self.rule(p.clone(), mask, norms, inclusion))
        elif bool((inclusion == 1.0).all()) or (self._informed and bool(mask.all())):
            self._follow(mask, norms)
        else:
            self._scale_free(mask, norms, inclusion, drawn)

    @property
    def _informed(self) -> bool:
        """Whether a step with full information has come: then one in which every arm was drawn has it as well."""
        return bool(self._squares.any())

    def _follow(self, mask: torch.Tensor, norms: torch.Tensor) -> None:
        """Take probabilities in proportion to the root of the mean squared norms.

        An arm that was not seen had no gradient in this step, and keeps its mean. The mean starts at 0 and is not
        corrected for it: that is one factor for all arms, which the projection takes out.
        """
        length = torch.linalg.vector_norm(norms[mask])
        if length == 0:  # no arm has a gradient: nothing to learn from
            return
        followed = torch.lerp(norms.square() / length, self._squares, SQUARES_DECAY)
        self._squares = torch.where(mask, followed, self._squares)
        # Relative to the largest before the root is taken, so that a factor of two on all norms changes no bit.
        weights = (self._squares / self._squares.max()).sqrt().clamp(min=LEAST_WEIGHT)
        self.probabilities = project_with_min_probability(weights, self.budget, self.minimum)

    def _scale_free(
        self, mask: torch.Tensor, norms: torch.Tensor, inclusion: torch.Tensor, drawn: torch.Tensor
    ) -> None:
        p = self.probabilities
        ratio = norms[mask] / drawn[mask]
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
            "squares": self._squares.clone(),
            "budget": torch.tensor(self.budget, dtype=torch.float64),
            **{f"{OWN}{key}": value for key, value in own_state(self.rule).items()},
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned; nothing changes if it does not fit.

        Raises:
            ValueError: it was saved for another number of arms, or holds what no bandit can have learnt.
            KeyError: it is incomplete.
        """
        probabilities = self._checked(state["probabilities"].clone())
        learnt = {name: state[name].to("cpu", torch.float64, copy=True) for name in ("scale", "squares", "budget")}
        for name, shape in (("scale", ()), ("squares", probabilities.shape), ("budget", ())):
            value = learnt[name]
            if value.shape != shape or not bool((value.isfinite() & (value >= 0)).all()):
                raise ValueError(
                    f"the bandit's {name!r} in the state is {value.tolist()}; it must have shape {tuple(shape)} and "
                    "be >= 0. Use the state as it was saved, or start without it."
                )
        load_own_state(self.rule, {k.removeprefix(OWN): v for k, v in state.items() if k.startswith(OWN)})
        self.probabilities, self.budget = probabilities, float(learnt["budget"])
        self._scale, self._squares = learnt["scale"], learnt["squares"]
