"""Finds the largest and smallest curvature of a loss by Hessian-vector products and the Lanczos method."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from slsam_peft.sharpness.measures import Objective

DOUBLE_BACKWARD = "double backward"
CENTRAL = "central differences of gradients"
AGREEMENT = 0.99  # cosine between the two, at least

_STEP = 1e-3  # of central differences, of the parameters' length; see `HessianVector`


class HessianVector:
    """Products of a loss's Hessian with vectors.

    By double backward where it works. It may fail (fused kernels have no second derivative) or be silently wrong (a
    backward pass written by hand that is not differentiable); so it is compared once, in the direction of the
    gradient, with central differences of gradients, and those are used where it fails or differs.

    Args:
        objective (`Objective`): The loss.
        parameters (`Sequence[torch.Tensor]`): Leaves that require grad. Central differences move them in place and put
            them back, bit for bit.
        method (`str`, *optional*): `"double backward"` or `"central differences of gradients"`; chosen as above where
            it is missing.

    Attributes:
        method (`str`): What is used.
        agreement (`float` or `None`): Cosine between the two products; `None`: not compared, or no second derivative.
    """

    def __init__(self, objective: Objective, parameters: Sequence[torch.Tensor], method: str | None = None) -> None:
        self._objective, self._parameters = objective, list(parameters)
        self.agreement: float | None = None
        self.method = method or self._choose()

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """Return H v for a flat vector v, of its shape and dtype."""
        return self._double(vector) if self.method == DOUBLE_BACKWARD else self._central(vector)

    def _choose(self) -> str:
        _, gradient = self._objective.gradient(self._parameters)
        vector = _flat(gradient)
        length = float(vector.norm())
        if length == 0:
            return DOUBLE_BACKWARD
        vector = vector / length
        try:
            exact = self._double(vector)
        except RuntimeError:  # how torch says that an operation has no second derivative
            return CENTRAL
        approximate = self._central(vector)
        product = math.sqrt(_dot(exact, exact) * _dot(approximate, approximate))
        self.agreement = _dot(exact, approximate) / product if product else 1.0
        return DOUBLE_BACKWARD if self.agreement >= AGREEMENT else CENTRAL

    def _double(self, vector: torch.Tensor) -> torch.Tensor:
        pieces = self._pieces(vector)
        total = torch.zeros_like(vector)
        for batch, weight in zip(self._objective.batches, self._objective.weights, strict=True):
            first = torch.autograd.grad(
                batch(), self._parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            second = torch.autograd.grad(
                first, self._parameters, grad_outputs=pieces, allow_unused=True, materialize_grads=True
            )
            total.add_(_flat(second), alpha=weight)
        return total

    @torch.no_grad()
    def _central(self, vector: torch.Tensor) -> torch.Tensor:
        length = float(vector.norm())
        if length == 0:
            return torch.zeros_like(vector)
        start = [p.clone() for p in self._parameters]
        size = math.sqrt(sum(float(p.square().sum()) for p in start))
        step = _STEP * max(size, 1.0) / length
        results = []
        try:
            for sign in (1, -1):
                for parameter, old, piece in zip(self._parameters, start, self._pieces(vector), strict=True):
                    parameter.copy_(old).add_(piece, alpha=sign * step)
                with torch.enable_grad():
                    results.append(_flat(self._objective.gradient(self._parameters)[1]))
        finally:
            for parameter, old in zip(self._parameters, start, strict=True):
                parameter.copy_(old)
        return (results[0] - results[1]) / (2 * step)

    def _pieces(self, vector: torch.Tensor) -> list[torch.Tensor]:
        parts = vector.split([p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]


@dataclass(frozen=True)
class Extremes:
    """The ends of a symmetric operator's spectrum.

    Args:
        top (`float`): Largest eigenvalue.
        top_residual (`float`): ‖A x - top x‖ of its unit vector: an eigenvalue lies within that of `top`.
        bottom (`float`): Smallest eigenvalue.
        bottom_residual (`float`): The same for it.
        steps (`int`): Products taken.
    """

    top: float
    top_residual: float
    bottom: float
    bottom_residual: float
    steps: int


def lanczos(
    product: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    steps: int,
) -> Extremes:
    """Approximate the extreme eigenvalues of a symmetric operator by the Lanczos method.

    Every vector is made orthogonal to all before it, twice; so they are all kept.

    Args:
        product (callable): From a flat vector to the operator times it.
        start (`torch.Tensor`): Any vector that is not zero, shape `(n,)`.
        steps (`int`): Products, at least 1; more than `n` are not taken.

    Raises:
        ValueError: `start` is zero or a product is not finite.
    """
    length = float(start.norm())
    if length == 0:
        raise ValueError("the Lanczos method needs a start that is not zero.")
    basis = [start / length]
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(steps, start.numel())):
        image = product(basis[-1])
        if not torch.isfinite(image).all():
            raise ValueError("a Hessian-vector product is not finite; is the loss?")
        alphas.append(_dot(image, basis[-1]))
        for _ in range(2):
            for vector in basis:
                image = image - _dot(image, vector) * vector
        betas.append(float(image.norm()))
        if betas[-1] <= 1e-7 * max(map(abs, alphas)):
            break  # an invariant subspace: its eigenvalues are exact
        basis.append(image / betas[-1])
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    for i, beta in enumerate(betas[: len(alphas) - 1]):
        matrix[i, i + 1] = matrix[i + 1, i] = beta
    values, vectors = torch.linalg.eigh(matrix)
    residuals = (betas[-1] * vectors[-1]).abs()
    return Extremes(float(values[-1]), float(residuals[-1]), float(values[0]), float(residuals[0]), len(alphas))


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a.double() @ b.double())
