"""Sampling schemes draw the active set, given inclusion probabilities and a generator.

A scheme is a callable `(probabilities, generator) -> mask`, all of shape `(L,)`, float64 and boolean, on the CPU. The
built-in ones also state the inclusion probabilities they realise, which are not always those they were given: drawing
again when nothing came up raises them, and a scheme that is compact in depth cannot realise every vector.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from slsam_peft.algorithm.given import load_own_state, own_state
from slsam_peft.algorithm.projection import project_with_min_probability
from slsam_peft.config import SLSAMConfig

SamplingScheme = Callable[[torch.Tensor, torch.Generator], torch.Tensor]

TINY = 1e-12  # in the place of a probability of 0, so that something is left to share out
MAX_TILT = 64.0  # leaves only the top
TILT_STEPS = 60
TILT_TOLERANCE = 1e-6  # relative, on the expected number of active arms
SUM_DIGITS = 9  # of sums of probabilities, which projections meet to about 1e-12

GOLDEN = (5**0.5 - 1) / 2  # Kronecker sequence u + t * GOLDEN mod 1: low discrepancy for every length
LAST_POINT = 1.0 - 2.0**-53


class _Stateless:
    """A scheme whose draws depend on nothing but its arguments."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore nothing."""


class Bernoulli(_Stateless):
    """Every arm independently, drawn again if none came up: the paper's scheme (Poisson sampling)."""

    def __call__(self, probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a mask, shape `(L,)`; never empty."""
        while True:
            mask = torch.rand(len(probabilities), dtype=torch.float64, generator=generator) < probabilities
            if mask.any():
                return mask

    def inclusion(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return p / P(not empty), shape `(L,)`."""
        return probabilities / (1.0 - (1.0 - probabilities).prod())


class FixedSize(_Stateless):
    """A constant number of arms with exact inclusion probabilities: systematic sampling in a random order.

    With sum p = k + fraction, k or k + 1 arms are drawn (Madow 1949).
    """

    def __call__(self, probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a mask, shape `(L,)`; never empty."""
        order = torch.randperm(len(probabilities), generator=generator)
        ends = self.inclusion(probabilities)[order].cumsum(0)
        start = torch.rand((), dtype=torch.float64, generator=generator)
        ends[-1] = ends[-1].round() if (ends[-1] - ends[-1].round()).abs() < 1e-9 else ends[-1]
        hits = (ends - start).ceil().clamp(min=0)  # points start, start + 1, ... passed so far
        drawn = torch.diff(hits, prepend=hits.new_zeros(1)) > 0
        return torch.empty_like(drawn).scatter_(0, order, drawn)

    def inclusion(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return p, raised to a sum of 1 where it is less; shape `(L,)`."""
        return probabilities / probabilities.sum().clamp(max=1.0)


class _OnePoint:
    """A scheme that maps one point u of [0, 1) to a mask.

    u runs through a low-discrepancy sequence, each point followed by its mirror image 1 - u: every draw is uniform,
    and means over a few steps lie close to their expectation, so that a budget of cost is met within few steps.
    """

    def __init__(self, depths: Sequence[int]) -> None:
        self.order = torch.argsort(torch.tensor(depths), stable=True)
        self.start: float | None = None
        self.draws = 0

    def next_point(self, generator: torch.Generator) -> float:
        """Return u and move on; the generator only sets where the sequence starts."""
        if self.start is None:
            self.start = float(torch.rand((), dtype=torch.float64, generator=generator))
        point = (self.start + self.draws // 2 * GOLDEN) % 1.0
        mirrored = self.draws % 2 == 1
        self.draws += 1
        return min(1.0 - point, LAST_POINT) if mirrored else point

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return where the sequence started (NaN before the first draw) and how far it is."""
        start = float("nan") if self.start is None else self.start
        return {"start": torch.tensor(start, dtype=torch.float64), "draws": torch.tensor(self.draws)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned; nothing changes if it does not fit.

        Raises:
            ValueError: no sequence starts or gets there.
            KeyError: the state is incomplete.
        """
        start, draws = float(state["start"]), int(state["draws"])
        if not (math.isnan(start) or 0.0 <= start < 1.0) or draws < 0:
            raise ValueError(f"start={start}, draws={draws} in the state; they must be in [0, 1) or NaN, and >= 0.")
        self.start = None if math.isnan(start) else start
        self.draws = draws


class Window(_OnePoint):
    r"""A window that slides over the depth, with exact inclusion probabilities.

    In depth order, arm $l$ is active while $u$ lies in $[b_l, b_l + p_l)$, where
    $b_l = \min(\kappa \sum_{j<l} p_j, 1 - p_l)$ with $\kappa$ such that the last interval ends at 1. The intervals
    cover [0, 1), so no draw is empty; the window is contiguous where $p$ varies slowly with depth and has gaps where
    it jumps.

    Args:
        depths (`Sequence[int]`): Depth of each arm.
    """

    def __call__(self, probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a mask, shape `(L,)`; never empty."""
        p = self.inclusion(probabilities)[self.order]
        before = p.cumsum(0) - p
        kappa = (1.0 - p[-1]) / before[-1].clamp(min=1.0 - p[-1]) if len(p) > 1 and p[-1] < 1 else 0.0
        start = torch.minimum(kappa * before, 1.0 - p)
        start[0], end = 0.0, start + p
        end[-1] = 1.0
        end[:-1] = torch.maximum(end[:-1], start[1:])  # rounding may leave a gap between two
        u = self.next_point(generator)
        return torch.zeros(len(p), dtype=torch.bool).scatter_(0, self.order, (start <= u) & (u < end))

    def inclusion(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return p, raised to a sum of 1 where it is less; shape `(L,)`."""
        return probabilities / probabilities.sum().clamp(max=1.0)


class Depth(_OnePoint):
    r"""Every arm above a drawn depth: a step costs what lies above it.

    The probability $\pi_l$ of an arm is that of the drawn depth lying at or below it, so it cannot fall with depth and
    is 1 at the top: an arm that deserves to be reached carries everything above it along. Equal $p$ give draws that
    are spread over the whole depth, with a tilt $\tau$ that meets the sum of $p$:

    $$\pi^0_l = \max(\text{least},\; (l / L)^\tau)$$

    Other $p$ ask for $w_l = \pi^0_l\, p_l / \bar p$. What an arm asks for, those above it get as well: the running
    maximum of $w$ over depth, projected onto the sum of $p$ between the least and 1. On recorded norms of 30 blocks
    the bandit's $p$ lower $\sum_l a_l^2 / \pi_l$ so by 51, 41 and 7 % where a tenth, a quarter and half of the arms
    are drawn. No draw in depth order can favour an arm over those above it. Arms of equal depth go together.

    Args:
        depths (`Sequence[int]`): Depth of each arm.
        min_share (`float`): Least probability, as a share of the mean of $p$; the bandit's own.
    """

    def __init__(self, depths: Sequence[int], min_share: float) -> None:
        super().__init__(depths)
        _, self.group, sizes = torch.unique(torch.tensor(depths), return_inverse=True, return_counts=True)
        self.sizes = sizes.double()
        self.log_depth = torch.log(torch.arange(1, len(sizes) + 1, dtype=torch.float64) / len(sizes))
        self.below = self.group < len(sizes) - 1
        self.min_share = min_share
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._even: tuple[tuple[float, float], torch.Tensor] | None = None

    def __call__(self, probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a mask, shape `(L,)`; never empty."""
        return self.next_point(generator) < self.inclusion(probabilities)

    def inclusion(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of the drawn depth lying at or below each arm, shape `(L,)`."""
        if self._last is None or not torch.equal(self._last[0], probabilities):
            even = bool((probabilities == probabilities[0]).all())
            budget, mean = float(probabilities.sum()), float(probabilities.mean())
            if even:
                realised = self._spread(budget, self.min_share * mean)[self.group]
            else:
                realised = self._following(probabilities, budget, mean)
            self._last = (probabilities.clone(), realised)
        return self._last[1]

    def _spread(self, budget: float, minimum: float) -> torch.Tensor:
        """Solve for the tilt; return the probabilities by depth where $p$ is even, shape `(G,)`."""
        if self._even is not None and self._even[0] == (budget, minimum):
            return self._even[1]
        low, high = -1.0, MAX_TILT  # below 0 no tilt: all ones
        for _ in range(TILT_STEPS):
            middle = (low + high) / 2
            spread = torch.exp(max(middle, 0.0) * self.log_depth).clamp(min=minimum)
            missing = budget - float(spread.dot(self.sizes))
            low, high = (low, middle) if missing > 0 else (middle, high)
            if abs(missing) < TILT_TOLERANCE * budget:
                break
        self._even = ((budget, minimum), spread)
        return spread

    def _following(self, probabilities: torch.Tensor, budget: float, mean: float) -> torch.Tensor:
        """Return what uneven probabilities are given, shape `(L,)`."""
        # The sum is the same from step to step but for its last bits, and so is what even probabilities would get.
        budget, minimum = round(budget, SUM_DIGITS), self.min_share * round(mean, SUM_DIGITS)
        wanted = self._spread(budget, minimum)[self.group] * (probabilities / mean).clamp(min=TINY)
        # Nothing falls with depth, and all but the top share what the top leaves of the sum.
        means = torch.zeros_like(self.sizes).index_add_(0, self.group, wanted) / self.sizes
        below = means.cummax(0).values[self.group[self.below]]
        left = budget - float(self.sizes[-1])
        realised = torch.ones_like(probabilities)
        if len(below):
            left = min(max(left, minimum * len(below)), float(len(below)))
            realised[self.below] = project_with_min_probability(below, left, minimum)
        return realised


class _Checked:
    """A user's callable as a scheme.

    Its inclusion probabilities are taken to be those it is given, and it has no state, unless it is an object with
    methods `inclusion`, `state_dict` and `load_state_dict` of its own.
    """

    def __init__(self, draw: SamplingScheme) -> None:
        self.draw = draw

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the object's own state, where it has one."""
        return own_state(self.draw)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        load_own_state(self.draw, state)

    def __call__(self, probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn = self.draw(probabilities.clone(), generator)
        try:
            mask = torch.as_tensor(drawn)
            fits = mask.dtype in (torch.bool, torch.uint8) and mask.shape == probabilities.shape and bool(mask.any())
        except (TypeError, ValueError, RuntimeError):  # what torch raises for what is no tensor
            fits = False
        if not fits:
            raise ValueError(
                f"the sampling scheme returned {drawn!r}; it must return a boolean mask of shape "
                f"({len(probabilities)},) with at least one active arm."
            )
        return mask.to("cpu", torch.bool, copy=True)  # the callable may use its tensor again

    def inclusion(self, probabilities: torch.Tensor) -> torch.Tensor:
        own: Any = getattr(self.draw, "inclusion", None)
        if own is None:
            return probabilities
        stated = torch.as_tensor(own(probabilities.clone()), dtype=torch.float64).detach().to("cpu", copy=True)
        if stated.shape != probabilities.shape or not bool(((stated >= 0) & (stated <= 1)).all()):
            raise ValueError(
                f"the sampling scheme states the inclusion probabilities {stated.tolist()}; they must be "
                f"{len(probabilities)} numbers in [0, 1]."
            )
        return stated


def build_scheme(config: SLSAMConfig, depths: Sequence[int | None]):
    """Return the sampling scheme that `config.design` names.

    Args:
        config (`SLSAMConfig`): Read: `design`, `min_probability`.
        depths (`Sequence[int | None]`): Depth of each arm, `None` in a model without blocks.

    Raises:
        ValueError: `"window"` or `"depth"` on arms without a depth order.
    """
    config = config.resolved
    if callable(config.design):
        return _Checked(config.design)
    if config.design == "bernoulli":
        return Bernoulli()
    if config.design == "fixed_size":
        return FixedSize()
    known = [d for d in depths if d is not None]
    if len(known) < len(depths):
        raise ValueError(
            f"design='{config.design}' needs arms with a depth, and this model has no stack of blocks; use "
            "design='bernoulli' or 'fixed_size'."
        )
    return Window(known) if config.design == "window" else Depth(known, config.min_probability)
