"""The bandit: projections, and a rule that learns at every scale and keeps exploring."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slsam_peft import SLSAMConfig
from slsam_peft.algorithm.bandit import Bandit
from slsam_peft.algorithm.projection import project, project_with_min_probability
from tests.tolerances import BANDIT_SCALE, SUM

ARMS, FRACTION, ROUNDS = 30, 0.2, 2000

weights = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40).map(lambda v: torch.tensor(v, dtype=torch.float64))


@given(weights, st.floats(0.02, 1.0), st.floats(0.0, 0.99))
@settings(max_examples=200, deadline=None)
def test_projection_with_a_minimum(w, fraction, share):
    budget, minimum = fraction * len(w), share * fraction
    p = project_with_min_probability(w, budget, minimum)
    assert abs(float(p.sum()) - budget) <= SUM
    assert float(p.min()) >= minimum
    assert float(p.max()) <= 1.0
    order = torch.argsort(w)
    assert bool((p[order].diff() >= 0).all())
    torch.testing.assert_close(project_with_min_probability(p, budget, minimum), p, rtol=0, atol=SUM)


@given(weights, st.floats(0.02, 1.0))
@settings(max_examples=200, deadline=None)
def test_the_papers_projection(w, fraction):
    budget = fraction * len(w)
    p = project(w, budget)
    assert float(p.max()) <= 1.0 + SUM
    assert float(p.min()) >= 0.0
    assert bool((p[torch.argsort(w)].diff() >= -SUM).all())
    if float(w.min()) > 1e-4:  # below, the reference's guard lets the sum fall short
        assert abs(float(p.sum()) - budget) <= SUM * len(w)


def stationary(rule, scale, rounds=ROUNDS):
    """Play independent draws against arms with norms scale * (1..L)."""
    bandit = Bandit(ARMS, FRACTION * ARMS, SLSAMConfig(bandit=rule, active_fraction=FRACTION))
    generator = torch.Generator().manual_seed(0)
    norms = scale * torch.arange(1, ARMS + 1, dtype=torch.float64)
    for _ in range(rounds):
        mask = torch.rand(ARMS, dtype=torch.float64, generator=generator) < bandit.probabilities
        if mask.any():
            bandit.update(mask, norms, bandit.probabilities)
    return bandit


def better_half(p):
    return float(p[ARMS // 2 :].sum() / p.sum())


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_scale_free_learns_at_every_scale(scale):
    bandit = stationary("scale_free", scale)
    p = bandit.probabilities
    assert better_half(p) > 0.7  # in proportion to the norms it is 0.76
    assert torch.corrcoef(torch.stack([p, torch.arange(ARMS, dtype=torch.float64)]))[0, 1] > 0.95
    assert float(p.min()) >= bandit.minimum - SUM
    assert abs(float(p.sum()) - FRACTION * ARMS) <= SUM


def test_the_papers_rule_is_flat_or_collapses():
    early = stationary("paper", 0.05 / ARMS, rounds=60).probabilities
    assert float((early - FRACTION).abs().max()) < 0.01  # LLM-sized norms: it has learned nothing
    late = stationary("paper", 20.0).probabilities
    assert int((late < 1e-4).sum()) > ARMS // 2  # large norms: most arms are never drawn again
    assert better_half(late) < 0.7


@pytest.mark.parametrize("power", [-40, -3, 5, 30])
def test_scaling_by_a_power_of_two_changes_no_bit(power):
    a, b = stationary("scale_free", 1.0, 300), stationary("scale_free", 2.0**power, 300)
    assert torch.equal(a.probabilities, b.probabilities)


def test_scaling_by_any_constant_changes_nothing_to_speak_of():
    a, b = stationary("scale_free", 1.0, 300), stationary("scale_free", 0.0371, 300)
    torch.testing.assert_close(a.probabilities, b.probabilities, rtol=BANDIT_SCALE, atol=0)


def test_uniform_and_full_sets_learn_nothing():
    norms, mask = torch.arange(1, 6, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    uniform = Bandit(5, 2.0, SLSAMConfig(bandit="uniform", active_fraction=0.4))
    full = Bandit(5, 5.0, SLSAMConfig(active_fraction=1.0))
    for bandit in (uniform, full):
        before = bandit.probabilities.clone()
        bandit.update(mask, norms, before)
        assert torch.equal(bandit.probabilities, before)


def test_a_callable_rule_is_used_and_checked():
    rule = lambda p, mask, norms, inclusion: torch.full_like(p, 0.25)  # noqa: E731
    bandit = Bandit(4, 2.0, SLSAMConfig(bandit=rule, active_fraction=0.5))
    bandit.update(torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.float64), bandit.probabilities)
    assert bandit.probabilities.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    "returned", [[2.5] * 4, [-0.1, 0.5, 0.5, 0.5], [float("nan")] * 4, [0.5] * 3, [0.0] * 4, None, "all"], ids=str
)
def test_what_a_callable_rule_returns_is_checked(returned):
    """All zeros would never draw an arm again."""
    bandit = Bandit(4, 2.0, SLSAMConfig(bandit=lambda p, mask, norms, inclusion: returned, active_fraction=0.5))
    seen = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"4 probabilities in \[0, 1\], not all 0"):
        bandit.update(seen.bool(), seen, bandit.probabilities)
    assert bandit.probabilities.tolist() == [0.5] * 4


def test_without_a_minimum_probabilities_may_vanish():
    """exp underflows to 0 for arms that are never drawn again; the others go on."""
    bandit = Bandit(3, 1.0, SLSAMConfig(min_probability=0.0, bandit_rate=50.0))
    norms = torch.tensor([1.0, 1e-9, 1e-9], dtype=torch.float64)
    for _ in range(300):
        bandit.update(torch.tensor([True, False, False]), norms, bandit.probabilities.clone())
    assert bandit.probabilities.tolist() == [1.0, 0.0, 0.0]
