"""Projects weights onto inclusion probabilities: pure functions, float64 on the CPU, shapes `(L,)`."""

import torch

PAPER_LEAST_SUM = 1e-5  # the reference rule's guard against dividing by vanishing weights
TINY = 1e-300  # without a least probability, weights vanish in the end
PROJECTION_STEPS = 200  # far more than a bracketed Newton iteration takes in float64


def project(weights: torch.Tensor, budget: float) -> torch.Tensor:
    """Project onto {0 < p <= 1, sum p = budget} in the Kullback-Leibler sense (arXiv 2602.09395).

    From the largest weight down an arm gets probability 1 while its weight times the remaining budget exceeds the sum
    of the remaining weights; the rest are scaled to sum to what remains. A sum of remaining weights counts as at least
    1e-5, as in the reference traces: when nearly all weight has vanished the result sums to less than the budget.

    Args:
        weights (`torch.Tensor`): Non-negative weights, not all 0, shape `(L,)`.
        budget (`float`): Sum of the result, in (0, L].

    Returns:
        `torch.Tensor`: Probabilities, shape `(L,)`.
    """
    ordered, order = torch.sort(weights, descending=True, stable=True)
    remaining = ordered.flip(0).cumsum(0).flip(0).clamp(min=PAPER_LEAST_SUM)
    left = budget - torch.arange(len(weights), dtype=weights.dtype)
    saturated = int((ordered * left > remaining).to(torch.int64).cumprod(0).sum())
    rest = ordered[saturated:]
    if len(rest):
        # Summed from the largest down: the rule amplifies the last bit, and traces are compared to 1e-10.
        ordered[saturated:] = rest * (budget - saturated) / rest.cumsum(0)[-1].clamp(min=PAPER_LEAST_SUM)
    ordered[:saturated] = 1.0
    return torch.empty_like(ordered).scatter_(0, order, ordered)


def project_with_min_probability(weights: torch.Tensor, budget: float, minimum: float) -> torch.Tensor:
    """Project onto {minimum <= p <= 1, sum p = budget} in the Kullback-Leibler sense.

    The result is `clip(c * weights, minimum, 1)` for the one `c` that meets the budget, found by Newton's method: its
    sum is increasing and piecewise linear in `c`. A step that leaves the bracket is replaced by a bisection.

    Args:
        weights (`torch.Tensor`): Positive weights, shape `(L,)`; some may have vanished.
        budget (`float`): Sum of the result, in [L * minimum, L].
        minimum (`float`): Lower bound, in [0, 1].

    Returns:
        `torch.Tensor`: Probabilities, shape `(L,)`.
    """
    low, high = 0.0, 1.0 / max(float(weights.min()), TINY)
    c = budget / float(weights.sum())
    for _ in range(PROJECTION_STEPS):
        scaled = c * weights
        clipped = scaled.clamp(minimum, 1.0)
        missing = budget - float(clipped.sum())
        if abs(missing) <= 1e-14 * len(weights):
            break
        low, high = (c, high) if missing > 0 else (low, c)
        slope = float(weights[clipped == scaled].sum())
        c = c + missing / slope if slope > 0 else high
        if not low < c < high:
            c = (low + high) / 2
    return clipped
