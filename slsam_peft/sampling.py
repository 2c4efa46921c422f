"""Sampling designs: given inclusion probabilities and a generator, draw the active set.

A design is a callable `(probabilities, generator) -> mask`, all of shape `(L,)`, float64 and boolean, on the CPU. The
built-in ones also state the inclusion probabilities they realise, which are not always those they were given: drawing
again when nothing came up raises them, and a design that is compact in depth cannot realise every vector.
"""

from collections.abc import Callable, Sequence

import torch

from slsam_peft.config import SLSAMConfig
from slsam_peft.projection import isotonic, project_with_floor

Design = Callable[[torch.Tensor, torch.Generator], torch.Tensor]

GOLDEN = (5**0.5 - 1) / 2  # Kronecker sequence u + t * GOLDEN mod 1: low discrepancy for every length


class Bernoulli:
    """Every arm independently, drawn again if none came up: the paper's design (Poisson sampling)."""

    def __call__(self, probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a mask, shape `(L,)`; never empty."""
        while True:
            mask = torch.rand(len(probabilities), dtype=torch.float64, generator=generator) < probabilities
            if mask.any():
                return mask

    def inclusion(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return p / P(not empty), shape `(L,)`."""
        return probabilities / (1.0 - (1.0 - probabilities).prod())


class FixedSize:
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
    """A design that maps one point u of [0, 1) to a mask; u runs through a low-discrepancy sequence."""

    def __init__(self, depths: Sequence[int]) -> None:
        self.order = torch.argsort(torch.tensor(depths), stable=True)
        self.point: float | None = None

    def next_point(self, generator: torch.Generator) -> float:
        """Return u and move on; the generator only sets where the sequence starts."""
        if self.point is None:
            self.point = float(torch.rand((), dtype=torch.float64, generator=generator))
        point = self.point
        self.point = (point + GOLDEN) % 1.0
        return point

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the position in the sequence; NaN before the first draw."""
        return {"point": torch.tensor(float("nan") if self.point is None else self.point, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        point = float(state["point"])
        self.point = None if point != point else point


class Window(_OnePoint):
    r"""A window that slides over the depth, with exact inclusion probabilities.

    In depth order, arm $l$ is active while $u$ lies in $[b_l, b_l + p_l)$, where
    $b_l = \min(\kappa \sum_{j<l} p_j, 1 - p_l)$ with $\kappa$ such that the last interval ends at 1. The intervals cover [0, 1), so no draw is empty; the window is
    contiguous where $p$ varies slowly with depth and has gaps where it jumps.

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
        u = self.next_point(generator)
        return torch.zeros(len(p), dtype=torch.bool).scatter_(0, self.order, (start <= u) & (u < end))

    def inclusion(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return p, raised to a sum of 1 where it is less; shape `(L,)`."""
        return probabilities / probabilities.sum().clamp(max=1.0)


class Depth(_OnePoint):
    """Every arm above a drawn floor: an update costs what lies above its floor.

    The probability of an arm is that of the floor lying at or below it, so it cannot fall with depth and is 1 at the
    top. The given probabilities are brought to that form (isotonic regression over depth, then the projection that
    keeps their sum and a floor under each), arms of equal depth together.

    Args:
        depths (`Sequence[int]`): Depth of each arm.
        floor_share (`float`): Least probability, as a share of the mean; the bandit's own floor.
    """

    def __init__(self, depths: Sequence[int], floor_share: float) -> None:
        super().__init__(depths)
        _, self.group, self.sizes = torch.unique(torch.tensor(depths), return_inverse=True, return_counts=True)
        self.floor_share = floor_share
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a mask, shape `(L,)`; never empty."""
        return self.next_point(generator) < self.inclusion(probabilities)

    def inclusion(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of the floor lying at or below each arm, shape `(L,)`."""
        if self._last is not None and torch.equal(self._last[0], probabilities):
            return self._last[1]
        sizes = self.sizes.to(probabilities.dtype)
        means = torch.zeros_like(sizes).index_add_(0, self.group, probabilities) / sizes
        means = isotonic(means, sizes)
        out = torch.ones_like(probabilities)
        lower = self.group < len(sizes) - 1
        count, budget = int(lower.sum()), float(probabilities.sum()) - float(sizes[-1])
        if count:
            floor = self.floor_share * float(probabilities.mean())
            budget = min(max(budget, count * floor), float(count))
            out[lower] = project_with_floor(means[self.group[lower]].clamp(min=1e-12), budget, floor)
        self._last = (probabilities.clone(), out)
        return out


class _Checked:
    """A user's callable as a design; its inclusion probabilities are taken to be those it is given."""

    def __init__(self, draw: Design) -> None:
        self.draw = draw

    def __call__(self, probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        mask = torch.as_tensor(self.draw(probabilities.clone(), generator))
        if mask.dtype not in (torch.bool, torch.uint8) or mask.shape != probabilities.shape or not mask.any():
            raise ValueError(
                f"the design returned {mask!r}; it must return a boolean mask of shape ({len(probabilities)},) with "
                "at least one active arm."
            )
        return mask.bool().cpu()

    def inclusion(self, probabilities: torch.Tensor) -> torch.Tensor:
        return probabilities


def build_design(config: SLSAMConfig, depths: Sequence[int | None]):
    """Return the design `config.design` names.

    Args:
        config (`SLSAMConfig`): Read: `design`, `probability_floor`.
        depths (`Sequence[int | None]`): Depth of each arm, `None` in a model without blocks.

    Raises:
        ValueError: `"window"` or `"depth"` on arms without a depth order.
    """
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
    return Window(known) if config.design == "window" else Depth(known, config.probability_floor)
