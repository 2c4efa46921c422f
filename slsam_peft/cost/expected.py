"""Computes from settings what a step is expected to cost, and the active fraction that meets `cost_budget`.

Expectations are those of the start, where every arm has the same probability. The bandit keeps the sum of the
probabilities, so with `design="depth"` and equal blocks the expected cost stays where it is.
"""

from collections.abc import Sequence
from typing import Any

import torch

from slsam_peft.algorithm.arms import Arm
from slsam_peft.algorithm.rules import build_ascent
from slsam_peft.algorithm.sampling import build_scheme
from slsam_peft.config import SLSAMConfig
from slsam_peft.cost.budget import independent_reach, reach_of, solve_active_fraction
from slsam_peft.cost.model import CostModel, Rule, Shapes

DRAWS = 256  # active sets averaged over where the lowest active block has no closed form
SEED = 0


def rule_of(config: SLSAMConfig, rides: bool = True) -> Rule:
    """Return how steps run under `config`.

    Args:
        config (`SLSAMConfig`): Read: `ascent`, `ascent_sequences`, `ascent_fraction`, `descent`, `rho`.
        rides (`bool`, *optional*, defaults to `True`): Whether `ascent="auto"` lets sequences ride along.
    """
    config = config.resolved
    name: Any = config.ascent if config.is_perturbed else None
    ascent = build_ascent(name, config.ascent_sequences, config.ascent_fraction, rides)
    return Rule(ascent=ascent, descent=config.descent or "active")


def active_names(arms: Sequence[Arm], mask: torch.Tensor) -> frozenset[str]:
    """Return the names of the parameters of the arms in a mask, shape `(L,)`."""
    return frozenset(name for arm, on in zip(arms, mask.tolist(), strict=True) if on for name in arm.parameter_names)


class ExpectedCost:
    """Expected cost of a step, in units of a plain LoRA step, as a function of the active fraction.

    Args:
        model (`CostModel`): The model's costs.
        arms (`Sequence[Arm]`): Its arms.
        config (`SLSAMConfig`): Read: `design`, `min_probability` and what `rule_of` reads.
        shapes (`Sequence[tuple[int, int]]`): `(batch, length)` of the micro-batches of a typical step.
        rule (`Rule`, *optional*): How a step runs. Defaults to `rule_of(config)`.

    Raises:
        ValueError: the sampling scheme needs a depth order and the arms have none.
    """

    def __init__(
        self, model: CostModel, arms: Sequence[Arm], config: SLSAMConfig, shapes: Shapes, rule: Rule | None = None
    ) -> None:
        self.model, self.arms, self.config, self.shapes = model, arms, config.resolved, list(shapes)
        self.rule = rule or rule_of(config)
        self._depths = [arm.depth for arm in arms]
        blocks = [block.trainable for block in model.decoder.blocks]
        self._linear = None
        if [frozenset(arm.parameter_names) for arm in arms] == blocks:
            self._linear = model.linear_terms(self.shapes, self.rule)
        build_scheme(config, self._depths)

    @property
    def least_fraction(self) -> float:
        """The smallest fraction: one arm."""
        return 1.0 / len(self.arms)

    def inclusion(self, fraction: float) -> torch.Tensor:
        """Return the inclusion probabilities the sampling scheme realises at `fraction`, shape `(L,)`."""
        return build_scheme(self.config, self._depths).inclusion(self._probabilities(fraction))

    def __call__(self, fraction: float) -> float:
        """Return the expected cost at `fraction`, in (0, 1]."""
        p = self._probabilities(fraction)
        if self._linear is None:
            draws = self._draws(p)
            costs = {mask: self._cost(mask) for mask in set(draws)}
            return sum(costs[mask] for mask in draws) / len(draws)
        if fraction == 1.0:
            return self._linear.expected(p.tolist(), p.tolist())
        if self.config.design == "depth":
            reach = self.inclusion(fraction).tolist()
            return self._linear.expected(reach, reach)
        if self.config.design == "bernoulli":
            return self._linear.expected(*independent_reach(p.tolist()))
        return self._linear.expected(*reach_of(self._draws(p)))

    def solve(self, budget: float) -> float:
        """Return the fraction at which the expected cost is `budget`.

        Raises:
            ValueError: the budget is out of reach; the message names the least and the most reachable cost.
        """
        return solve_active_fraction(self, budget, self.least_fraction)

    def _probabilities(self, fraction: float) -> torch.Tensor:
        return torch.full((len(self.arms),), fraction, dtype=torch.float64)

    def _draws(self, p: torch.Tensor) -> list[tuple[bool, ...]]:
        if bool((p == 1.0).all()):
            return [(True,) * len(p)]
        scheme, generator = build_scheme(self.config, self._depths), torch.Generator().manual_seed(SEED)
        return [tuple(scheme(p, generator).tolist()) for _ in range(DRAWS)]

    def _cost(self, mask: tuple[bool, ...]) -> float:
        return self.model.ratio(active_names(self.arms, torch.tensor(mask)), self.shapes, self.rule)
