"""Computes a step's expected cost under a sampling scheme, and the active fraction that meets a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SOLVE_STEPS = 60  # bisections, at most: to the last bit of a fraction in (0, 1]
SOLVE_TOLERANCE = 1e-4  # of the budget


@dataclass(frozen=True)
class LinearCost:
    r"""Expected cost of a step with block arms, in units of a plain LoRA step.

    $$\mathrm{const} + \sum_l \mathrm{reached}_l P(f \le l) + \mathrm{active}_l p_l + \mathrm{lowest}_l P(f = l)$$

    Exact for every sampling scheme, and for a single active set with indicators in place of the probabilities.

    Args:
        const (`float`): What runs in every step.
        reached (`tuple[float, ...]`): Added by a block that is not below the lowest active one.
        active (`tuple[float, ...]`): Added where it is active.
        lowest_active (`tuple[float, ...]`): Added where it is the lowest active one (negative: that block's input
            needs no gradient).
    """

    const: float
    reached: tuple[float, ...]
    active: tuple[float, ...]
    lowest_active: tuple[float, ...]

    def expected(self, reach: Sequence[float], inclusion: Sequence[float]) -> float:
        """Expected cost for `reach`, $P(f <= l)$, and `inclusion`, $p_l$, both with one entry per block."""
        at = [later - earlier for later, earlier in zip(reach, [0.0, *reach[:-1]], strict=True)]
        terms = zip(self.reached, reach, self.active, inclusion, self.lowest_active, at, strict=True)
        return self.const + math.fsum(r * q + a * p + s * d for r, q, a, p, s, d in terms)


def independent_reach(probabilities: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return `(reach, inclusion)` of arms that are drawn independently, and drawn again when none came up.

    Args:
        probabilities (`Sequence[float]`): Probability of each block, lowest first.
    """
    empty, reach = 1.0, []
    for p in probabilities:
        empty *= 1.0 - p
        reach.append(1.0 - empty)
    return [r / reach[-1] for r in reach], [p / reach[-1] for p in probabilities]


def reach_of(draws: Sequence[Sequence[bool]]) -> tuple[list[float], list[float]]:
    """Return `(reach, inclusion)`, the frequencies in a sample of active sets of one flag per block."""
    blocks = range(len(draws[0]))
    lowest_blocks = [next(i for i, on in enumerate(draw) if on) for draw in draws]
    reach = [sum(lowest_active <= i for lowest_active in lowest_blocks) / len(draws) for i in blocks]
    return reach, [sum(bool(draw[i]) for draw in draws) / len(draws) for i in blocks]


def solve_active_fraction(
    expected: Callable[[float], float], budget: float, least: float = 0.0, most: float = 1.0
) -> float:
    """Return the active fraction at which the expected cost meets a budget.

    Args:
        expected (`Callable[[float], float]`): Expected cost in units of a plain LoRA step; must not fall with the
            fraction.
        budget (`float`): What it should be.
        least (`float`, *optional*, defaults to `0.0`): Smallest fraction that can be drawn (one arm, or every arm
            at its least probability).
        most (`float`, *optional*, defaults to `1.0`): Largest fraction.

    Raises:
        ValueError: the budget is out of reach. The message names the least and the most reachable cost.
    """
    low, high = expected(least), expected(most)
    if not low <= budget <= high:
        advice = (
            "use a cheaper ascent (ascent='partial' with a smaller ascent_fraction, or 'remembered'), or "
            "design='depth', whose active sets cost least"
            if budget < low
            else f"set cost_budget={high:.3g} or active_fraction=1 to train every arm in every step"
        )
        raise ValueError(
            f"cost_budget={budget:g} is out of reach: with these settings a step costs between {low:.3f} and "
            f"{high:.3f} plain LoRA steps on average; {advice}."
        )
    for _ in range(SOLVE_STEPS):
        middle = (least + most) / 2
        missing = budget - expected(middle)
        if abs(missing) <= SOLVE_TOLERANCE * budget:
            break
        least, most = (middle, most) if missing > 0 else (least, middle)
    return middle
