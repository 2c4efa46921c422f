r"""Measures how flat a loss lies around a point: worst and average rise nearby, curvature, and slices through it.

Nothing here knows of models or adapters: a `Space` is a list of tensors that can be moved, an `Objective` a mean loss
over batches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

SMALLEST_SCALE = 0.01  # eta of ASAM (Kwon et al., ICML 2021): entries near 0 can move as well

Offsets = Sequence[torch.Tensor]


class Objective:
    """A mean loss over batches.

    Args:
        batches (`Sequence[Callable]`): Each returns one batch's mean loss, shape `()`, with its graph.
        weights (`Sequence[float]`): Each batch's share of the whole; they sum to 1.
    """

    def __init__(self, batches: Sequence[Callable[[], torch.Tensor]], weights: Sequence[float]) -> None:
        self.batches, self.weights = tuple(batches), tuple(weights)

    @torch.no_grad()
    def value(self) -> float:
        """Return the loss."""
        return sum(weight * float(batch()) for batch, weight in zip(self.batches, self.weights, strict=True))

    def gradient(self, parameters: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        """Return the loss and its gradient, one batch's graph at a time."""
        value, total = 0.0, [torch.zeros_like(p) for p in parameters]
        for batch, weight in zip(self.batches, self.weights, strict=True):
            loss = batch()
            value += weight * float(loss.detach())
            for into, part in zip(total, _gradients(loss, parameters), strict=True):
                into.add_(part, alpha=weight)
        return value, total


class Space:
    """Tensors that are moved together, and the weights they are held against.

    Args:
        parameters (`Sequence[torch.Tensor]`): Leaves of the graph that require grad. They are moved in place and are
            what they were afterwards, bit for bit.
        weight (callable, *optional*): From an index to the weight that its tensor belongs to, of the same shape; the
            tensor itself where it is missing. Adaptive radii and filter normalisation are relative to it.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], weight: Callable[[int], torch.Tensor] | None = None
    ) -> None:
        self.parameters = list(parameters)
        self._start = [p.detach().clone() if p.detach().any() else None for p in self.parameters]  # None: zero
        self._weight = weight

    @property
    def size(self) -> int:
        """Number of scalar parameters."""
        return sum(p.numel() for p in self.parameters)

    def weight(self, index: int) -> torch.Tensor:
        """Return the weight that a tensor belongs to."""
        if self._weight is not None:
            return self._weight(index)
        start = self._start[index]
        return torch.zeros_like(self.parameters[index]) if start is None else start

    def scale(self, index: int, adaptive: bool) -> torch.Tensor | float:
        """Return what an offset is multiplied with, entry by entry: |w| + 0.01 for adaptive radii, else 1."""
        return self.weight(index).abs().add_(SMALLEST_SCALE) if adaptive else 1.0

    @contextmanager
    def moved(self) -> Iterator[None]:
        """Let the block move the parameters; put them back when it ends."""
        try:
            yield
        finally:
            self.move(None)

    @torch.no_grad()
    def move(self, offsets: Offsets | None, adaptive: bool = False) -> None:
        """Put the parameters at an offset from their start; `None`: at their start."""
        for i, (parameter, start) in enumerate(zip(self.parameters, self._start, strict=True)):
            if start is None:
                parameter.zero_()
            else:
                parameter.copy_(start)
            if offsets is not None:
                parameter.addcmul_(offsets[i], torch.as_tensor(self.scale(i, adaptive), device=parameter.device))


@dataclass(frozen=True)
class WorstCase:
    """The largest rise found within a radius.

    Args:
        rise (`float`): Of all points tried; a lower bound of the true one.
        one_step (`float`): At the end of one step along the gradient, as SAM takes it.
        by_start (`tuple[float, ...]`): The largest rise from each start: the gradient, then random ones.
    """

    rise: float
    one_step: float
    by_start: tuple[float, ...]


def worst_case(
    objective: Objective,
    space: Space,
    rho: float,
    *,
    steps: int,
    restarts: int,
    generator: torch.Generator,
    adaptive: bool = False,
) -> WorstCase:
    """Search the largest rise of the loss within a ball, by projected gradient ascent.

    Each step goes as far as the radius along the normalised gradient and back onto the ball.

    Args:
        objective (`Objective`): The loss.
        space (`Space`): What is moved.
        rho (`float`): Radius: of the offsets, or of the offsets over |w| + 0.01 where adaptive.
        steps (`int`): Ascent steps from each start, at least 1.
        restarts (`int`): Further starts, at random points of the sphere.
        generator (`torch.Generator`): Draws those, on the CPU.
        adaptive (`bool`, *optional*, defaults to `False`): The radius of ASAM (Kwon et al., ICML 2021).
    """
    found: list[list[float]] = []
    with space.moved():
        space.move(None)
        base = objective.value()
        for start in range(restarts + 1):
            offsets = _zeros(space) if start == 0 else _on_sphere(space, rho, generator)
            rises: list[float] = []
            for step in range(steps):
                space.move(offsets, adaptive)
                loss, gradient = objective.gradient(space.parameters)
                if step or start:
                    rises.append(loss - base)
                _ascend(space, offsets, gradient, rho, adaptive)
                del gradient
            space.move(offsets, adaptive)
            rises.append(objective.value() - base)
            found.append(rises)
    return WorstCase(max(max(r) for r in found), found[0][0], tuple(max(r) for r in found))


def _ascend(
    space: Space, offsets: list[torch.Tensor], gradient: list[torch.Tensor], rho: float, adaptive: bool
) -> None:
    for i, part in enumerate(gradient):
        part.mul_(space.scale(i, adaptive))
    norm = _norm(gradient)
    if norm == 0:
        return
    for offset, part in zip(offsets, gradient, strict=True):
        offset.add_(part, alpha=rho / norm)
    length = _norm(offsets)
    if length > rho:
        for offset in offsets:
            offset.mul_(rho / length)


@dataclass(frozen=True)
class AverageRise:
    """The mean rise of the loss under noise.

    Args:
        mean (`float`): Mean over the draws.
        standard_error (`float`): Of that mean; NaN for a single draw.
        norm (`float`): Length of the noise, root mean square.
    """

    mean: float
    standard_error: float
    norm: float


def average_rise(
    objective: Objective,
    space: Space,
    sigma: float,
    *,
    draws: int,
    generator: torch.Generator,
    adaptive: bool = False,
) -> AverageRise:
    """Return the mean rise under Gaussian noise; each draw is taken with both signs, which cancels the slope.

    Args:
        objective (`Objective`): The loss.
        space (`Space`): What is moved.
        sigma (`float`): Standard deviation of each entry, or of each entry over |w| + 0.01 where adaptive.
        draws (`int`): Pairs of draws, at least 1.
        generator (`torch.Generator`): Draws them, on the CPU.
        adaptive (`bool`, *optional*, defaults to `False`): Noise in proportion to the weights.
    """
    rises, squares = [], []
    with space.moved():
        space.move(None)
        base = objective.value()
        for _ in range(draws):
            noise = [x.mul_(sigma) for x in _normal(space, generator)]
            values = []
            for _ in range(2):
                space.move(noise, adaptive)
                values.append(objective.value())
                for part in noise:
                    part.neg_()
            rises.append(sum(values) / 2 - base)
            squares.append(sum(float((x * space.scale(i, adaptive)).square().sum()) for i, x in enumerate(noise)))
    mean = sum(rises) / draws
    variance = sum((r - mean) ** 2 for r in rises) / (draws - 1) if draws > 1 else math.nan
    return AverageRise(mean, math.sqrt(variance / draws), math.sqrt(sum(squares) / draws))


def filter_normalized(space: Space, generator: torch.Generator) -> list[torch.Tensor]:
    """Return a random direction in which every filter is as long as the weight's (Li et al., NeurIPS 2018).

    A filter is a row of a weight, what one output sees. Vectors (biases, norms) stay where they are, as there, unless
    there is nothing else.

    Args:
        space (`Space`): What is moved.
        generator (`torch.Generator`): Draws it, on the CPU.
    """
    vectors_only = all(p.dim() < 2 for p in space.parameters)
    direction = _normal(space, generator)
    for i, part in enumerate(direction):
        if part.dim() < 2 and not vectors_only:
            part.zero_()
            continue
        rows = part.view(part.shape[0], -1) if part.dim() > 1 else part.view(1, -1)
        lengths = space.weight(i).reshape(rows.shape).norm(dim=1, keepdim=True)
        rows.mul_(lengths / (rows.norm(dim=1, keepdim=True) + 1e-10))
    return direction


def line(objective: Objective, space: Space, direction: Offsets, places: Sequence[float]) -> list[float]:
    """Return the loss at each place along a direction."""
    return [row[0] for row in plane(objective, space, direction, direction, places, [0.0])]


def plane(
    objective: Objective,
    space: Space,
    first: Offsets,
    second: Offsets,
    places: Sequence[float],
    other_places: Sequence[float],
) -> list[list[float]]:
    """Return the loss on a grid: `[i][j]` at `places[i]` along the first and `other_places[j]` along the second."""
    with space.moved():
        rows = []
        for a in places:
            row = []
            for b in other_places:
                space.move(None)
                with torch.no_grad():
                    for parameter, x, y in zip(space.parameters, first, second, strict=True):
                        parameter.add_(x, alpha=a).add_(y, alpha=b)
                row.append(objective.value())
            rows.append(row)
    return rows


def _gradients(
    loss: torch.Tensor, parameters: Sequence[torch.Tensor], create_graph: bool = False
) -> list[torch.Tensor]:
    found = torch.autograd.grad(
        loss, list(parameters), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return list(found)


def _zeros(space: Space) -> list[torch.Tensor]:
    return [torch.zeros_like(p, requires_grad=False) for p in space.parameters]


def _normal(space: Space, generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in space.parameters]


def _on_sphere(space: Space, rho: float, generator: torch.Generator) -> list[torch.Tensor]:
    point = _normal(space, generator)
    length = _norm(point)
    return [x.mul_(rho / length) for x in point]


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(
        sum(float(t.double().square().sum()) if t.numel() < 1 << 20 else float(t.norm()) ** 2 for t in tensors)
    )
