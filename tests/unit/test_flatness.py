"""Flatness: closed forms on quadratics, and a small network whose Hessian is computed exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, hessian

from slsam_peft.cli.landscape import _decimals
from slsam_peft.sharpness.curvature import CENTRAL, DOUBLE_BACKWARD, HessianVector, lanczos
from slsam_peft.sharpness.measures import (
    SMALLEST_SCALE,
    Objective,
    Space,
    average_rise,
    filter_normalized,
    line,
    plane,
    worst_case,
)
from tests.tolerances import ASCENT, CENTRAL_DIFFERENCES, EXACT_FLOAT64, KRYLOV


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(size, seed=0):
    matrix = torch.randn(size, size, generator=generator(seed), dtype=torch.float64)
    return (matrix + matrix.T) / 2


class Quadratic:
    """L(w) = (w - c)' H (w - c) / 2 + g' (w - c), with w in two tensors, in two batches that add up to it."""

    def __init__(self, hessian, slope):
        self.hessian, self.slope = hessian, slope
        self.centre = torch.randn(len(slope), generator=generator(9), dtype=torch.float64)
        cut = len(slope) // 3
        self.parameters = [nn.Parameter(part.clone()) for part in (self.centre[:cut], self.centre[cut:])]
        self.objective = Objective([lambda: self.part(1.5), lambda: self.part(0.5)], [0.5, 0.5])

    def part(self, share):
        x = torch.cat(self.parameters) - self.centre
        return share * (x @ self.hessian @ x / 2 + self.slope @ x)

    def space(self):
        return Space(self.parameters)


def largest_on_ball(hessian, slope, rho):
    """The maximum of x'Hx/2 + g'x over |x| <= rho, by the secular equation of its eigenvalues."""
    values, vectors = torch.linalg.eigh(hessian)
    g = vectors.T @ slope

    def length(shift):
        return float((g / (shift - values)).norm())

    low, high = float(values[-1]) + 1e-12, float(values[-1]) + float(g.norm()) / rho + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) > rho else (low, middle)
    x = g / (high - values)
    return float((values * x * x).sum() / 2 + g @ x)


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_the_worst_case_on_a_quadratic_is_the_largest_value_on_the_ball(adaptive):
    case = Quadratic(symmetric(12) + 2 * torch.eye(12, dtype=torch.float64), torch.linspace(-1, 1, 12).double())
    scale = case.centre.abs() + SMALLEST_SCALE if adaptive else torch.ones(12, dtype=torch.float64)
    expected = largest_on_ball(scale[:, None] * case.hessian * scale, scale * case.slope, 0.7)
    found = worst_case(
        case.objective, case.space(), 0.7, steps=300, restarts=2, generator=generator(), adaptive=adaptive
    )
    assert found.rise == pytest.approx(expected, rel=ASCENT)
    step = 0.7 * scale * case.slope / (scale * case.slope).norm() * scale
    assert found.one_step == pytest.approx(float(step @ case.hessian @ step / 2 + case.slope @ step), rel=1e-9)
    assert len(found.by_start) == 3
    assert max(found.by_start) == found.rise


@given(seed=st.integers(0, 1000), rho=st.floats(0.01, 3), steps=st.integers(1, 6), restarts=st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_the_worst_case_is_a_lower_bound_and_more_steps_never_lower_it(seed, rho, steps, restarts):
    matrix = symmetric(6, seed)
    case = Quadratic(matrix @ matrix, torch.randn(6, generator=generator(seed), dtype=torch.float64))
    bound = largest_on_ball(case.hessian, case.slope, rho)
    found = [
        worst_case(case.objective, case.space(), rho, steps=n, restarts=restarts, generator=generator(seed)).rise
        for n in (steps, steps + 1)
    ]
    assert found[0] <= found[1] + 1e-12 <= bound * (1 + 1e-9) + 1e-9


def test_a_minimum_without_slope_is_left_by_random_starts():
    case = Quadratic(torch.diag(torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)), torch.zeros(3).double())
    alone = worst_case(case.objective, case.space(), 1.0, steps=50, restarts=0, generator=generator())
    assert alone.rise == 0
    found = worst_case(case.objective, case.space(), 1.0, steps=50, restarts=1, generator=generator())
    assert found.rise == pytest.approx(2.0, rel=ASCENT)  # half the top eigenvalue


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_the_average_rise_on_a_quadratic_is_half_the_trace(adaptive):
    case = Quadratic(symmetric(12) + 3 * torch.eye(12, dtype=torch.float64), torch.linspace(-1, 1, 12).double())
    scale = case.centre.abs() + SMALLEST_SCALE if adaptive else torch.ones(12, dtype=torch.float64)
    found = average_rise(case.objective, case.space(), 0.3, draws=400, generator=generator(), adaptive=adaptive)
    expected = 0.3**2 * float((scale**2 * case.hessian.diagonal()).sum()) / 2
    assert 0 < found.standard_error < 0.05 * expected
    assert abs(found.mean - expected) < 3 * found.standard_error
    assert found.norm == pytest.approx(0.3 * float(scale.norm()), rel=0.05)


def test_a_slope_adds_nothing_to_the_average():
    case = Quadratic(torch.zeros(12, 12).double(), 100 * torch.ones(12).double())
    found = average_rise(case.objective, case.space(), 0.3, draws=3, generator=generator())
    assert found.mean == pytest.approx(0, abs=1e-9)
    assert math.isnan(average_rise(case.objective, case.space(), 0.3, draws=1, generator=generator()).standard_error)


class Network:
    """Two layers with tanh and cross-entropy in float64, in batches of unequal size."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.inputs = torch.randn(11, 4, generator=generator(1), dtype=torch.float64)
        self.targets = torch.randint(3, (11,), generator=generator(2))
        self.parameters = list(self.model.parameters())
        cut = [slice(0, 7), slice(7, 11)]
        self.objective = Objective([lambda s=s: self.loss(s) for s in cut], [7 / 11, 4 / 11])

    def loss(self, rows=slice(None)):
        return nn.functional.cross_entropy(self.model(self.inputs[rows]), self.targets[rows])

    def hessian(self):
        names = [name for name, _ in self.model.named_parameters()]
        shapes = [p.shape for p in self.parameters]

        def loss(flat):
            parts = flat.split([s.numel() for s in shapes])
            weights = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
            return nn.functional.cross_entropy(functional_call(self.model, weights, self.inputs), self.targets)

        return hessian(loss)(torch.cat([p.detach().reshape(-1) for p in self.parameters]))


@pytest.mark.parametrize(
    ("method", "tolerance"), [(DOUBLE_BACKWARD, EXACT_FLOAT64), (CENTRAL, CENTRAL_DIFFERENCES), (None, EXACT_FLOAT64)]
)
def test_products_are_those_of_the_exact_hessian(method, tolerance):
    case = Network()
    exact = case.hessian()
    before = [p.detach().clone() for p in case.parameters]
    product = HessianVector(case.objective, case.parameters, method)
    for seed in range(3):
        vector = torch.randn(len(exact), generator=generator(seed), dtype=torch.float64)
        assert torch.allclose(product(vector), exact @ vector, rtol=0, atol=tolerance)
    assert all(torch.equal(p, old) for p, old in zip(case.parameters, before, strict=True))
    assert product.method == (method or DOUBLE_BACKWARD)


def test_lanczos_finds_the_exact_extremes():
    case = Network()
    values = torch.linalg.eigvalsh(case.hessian())
    start = torch.randn(len(values), generator=generator(), dtype=torch.float64)
    few = lanczos(HessianVector(case.objective, case.parameters), start, 12)
    assert few.steps == 12
    for found, residual in ((few.top, few.top_residual), (few.bottom, few.bottom_residual)):
        assert float((values - found).abs().min()) <= residual + 1e-12
    assert few.top <= float(values[-1]) + 1e-12
    all_of_it = lanczos(HessianVector(case.objective, case.parameters), start, 1000)
    assert all_of_it.steps <= len(values)
    assert all_of_it.top == pytest.approx(float(values[-1]), abs=KRYLOV)
    assert all_of_it.bottom == pytest.approx(float(values[0]), abs=KRYLOV)


def test_lanczos_stops_in_an_invariant_subspace():
    found = lanczos(lambda v: v * torch.tensor([3.0, 3.0, -1.0]).double(), torch.tensor([1.0, 1.0, 1.0]).double(), 10)
    assert found.steps == 2
    assert (found.top, found.bottom) == (pytest.approx(3), pytest.approx(-1))
    assert found.top_residual < 1e-12


def test_lanczos_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="start that is not zero"):
        lanczos(lambda v: v, torch.zeros(3), 2)
    with pytest.raises(ValueError, match="not finite"):
        lanczos(lambda v: v * math.nan, torch.ones(3), 2)


class _Once(torch.autograd.Function):
    """x³/6 with a backward pass that cannot be differentiated, or that can and is wrong."""

    @staticmethod
    def forward(ctx, x, wrong):
        ctx.save_for_backward(x)
        ctx.wrong = wrong
        return (x**3 / 6).sum()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if not ctx.wrong:
            with torch.no_grad():
                return torch.from_numpy((x.detach() ** 2 / 2).numpy()) * grad.detach().requires_grad_(), None
        return (x.detach() ** 2 / 2 + 7 * (x - x.detach())) * grad, None


@pytest.mark.parametrize("wrong", [False, True], ids=["constant", "wrong"])
def test_a_wrong_second_derivative_is_noticed(wrong):
    x = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    product = HessianVector(Objective([lambda: _Once.apply(x, wrong)], [1.0]), [x])
    vector = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert product.method == CENTRAL
    assert torch.allclose(product(vector), x.detach() * vector, rtol=0, atol=CENTRAL_DIFFERENCES)


def test_directions_are_as_long_as_the_weights_row_by_row():
    weight = torch.randn(4, 6, generator=generator(1))
    bias, zero = torch.ones(4), torch.zeros(3, 2)
    direction = filter_normalized(Space([nn.Parameter(t) for t in (weight, bias, zero)]), generator())
    assert torch.allclose(direction[0].norm(dim=1), weight.norm(dim=1))
    assert not direction[1].any()
    assert not direction[2].any()
    assert filter_normalized(Space([nn.Parameter(bias)]), generator())[0].norm() == pytest.approx(2)


def test_directions_follow_the_weight_that_a_branch_belongs_to():
    weight = torch.randn(4, 6, generator=generator(1))
    branch = nn.Parameter(torch.zeros(4, 6))
    direction = filter_normalized(Space([branch], lambda i: weight), generator())
    assert torch.allclose(direction[0].norm(dim=1), weight.norm(dim=1))


def test_slices_are_the_loss_where_they_say():
    case = Quadratic(symmetric(6), torch.linspace(-1, 1, 6).double())
    first, second = ([torch.randn_like(p) for p in case.parameters] for _ in range(2))
    places = [-1.0, 0.0, 0.5]
    grid = plane(case.objective, case.space(), first, second, places, [0.0, 2.0])
    for i, a in enumerate(places):
        for j, b in enumerate([0.0, 2.0]):
            x = a * torch.cat(first) + b * torch.cat(second)
            assert grid[i][j] == pytest.approx(float(x @ case.hessian @ x / 2 + case.slope @ x), abs=1e-12)
    assert line(case.objective, case.space(), first, places) == pytest.approx([row[0] for row in grid], abs=1e-12)


def test_parameters_are_put_back_bit_for_bit_whatever_happens():
    case = Network()
    before = [p.detach().clone() for p in case.parameters]
    space = Space(case.parameters)
    worst_case(case.objective, space, 0.3, steps=2, restarts=1, generator=generator(), adaptive=True)
    average_rise(case.objective, space, 0.3, draws=2, generator=generator())
    assert all(torch.equal(p, old) for p, old in zip(case.parameters, before, strict=True))
    calls = []

    def failing():
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return case.loss()

    with pytest.raises(RuntimeError, match="out of memory"):
        average_rise(Objective([failing], [1.0]), space, 0.3, draws=2, generator=generator())
    assert all(torch.equal(p, old) for p, old in zip(case.parameters, before, strict=True))


@pytest.mark.parametrize(
    ("levels", "decimals"), [([4.125, 4.13, 4.135], 3), ([1.0, 2.0], 0), ([0.5, 0.75], 1), ([2.0, 2.0], 3), ([7.0], 0)]
)
def test_contour_labels_tell_neighbouring_levels_apart(levels, decimals):
    assert _decimals(levels) == decimals
