"""Designs realise the inclusion probabilities they state."""

import time

import pytest
import torch
from scipy import stats

from slsam_peft import SLSAM, SLSAMConfig
from slsam_peft.algorithm.arms import Arm
from slsam_peft.algorithm.bandit import Bandit
from slsam_peft.algorithm.sampling import build_scheme

ARMS = 12


def design_of(name, arms=ARMS):
    return build_scheme(SLSAMConfig(design=name, active_fraction=0.3), list(range(arms)))


def uneven(arms=ARMS, mean=0.3):
    p = 0.05 + torch.rand(arms, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return p * (mean * arms / p.sum())


@pytest.mark.parametrize("draws", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["bernoulli", "fixed_size", "window", "depth"])
def test_empirical_inclusion_matches_what_is_stated(name, draws):
    design, p, generator = design_of(name), uneven(), torch.Generator().manual_seed(0)
    stated = design.inclusion(p)
    counts = torch.zeros(ARMS, dtype=torch.float64)
    sizes = set()
    for _ in range(draws):
        mask = design(p, generator)
        counts += mask
        sizes.add(int(mask.sum()))
    assert 0 not in sizes
    free = (stated > 0) & (stated < 1)
    expected = draws * stated[free]
    chi_square = float(((counts[free] - expected) ** 2 / (expected * (1 - stated[free]))).sum())
    # One-sided: coupled arms and low-discrepancy sequences fit better than independent draws do.
    assert stats.chi2.sf(chi_square, int(free.sum())) > 0.01
    assert torch.equal(counts[~free], draws * stated[~free])
    if name == "fixed_size":
        assert sizes == {3, 4}  # sum p = 3.6


@pytest.mark.parametrize("name", ["bernoulli", "fixed_size", "window"])
def test_these_schemes_realise_the_sum_they_are_given(name):
    p = uneven()
    assert float(design_of(name).inclusion(p).sum()) == pytest.approx(float(p.sum()), rel=0.02)


def test_depth_is_every_arm_above_a_minimum_and_keeps_the_sum():
    design, generator = design_of("depth", 32), torch.Generator().manual_seed(0)
    for mean in (0.1, 0.4, 0.8):
        p = uneven(32, mean)
        stated = design.inclusion(p)
        assert float(stated.sum()) == pytest.approx(float(p.sum()), rel=1e-3)
        assert bool((stated.diff() >= 0).all())
        assert float(stated[-1]) == 1.0
        assert float(stated.min()) >= 0.1 * mean - 1e-9
        for _ in range(50):
            mask = design(p, generator)
            assert bool((mask[int(mask.nonzero()[0]) :]).all())


def test_arms_of_one_depth_go_together_and_lower_ones_are_still_drawn():
    """Module arms: several to a block, some outside the blocks."""
    depths = torch.tensor([-1, 0, 0, 0, 1, 1, 2, 2, 2, 3])
    design = build_scheme(SLSAMConfig(design="depth", active_fraction=0.4), depths.tolist())
    generator, p = torch.Generator().manual_seed(0), uneven(10, 0.4)
    counts = torch.zeros(10, dtype=torch.float64)
    for _ in range(4000):
        mask = design(p, generator)
        counts += mask
        assert torch.equal(mask, depths >= int(depths[mask].min()))
    assert float(counts.min()) > 0
    torch.testing.assert_close(counts / 4000, design.inclusion(p), rtol=0, atol=2e-3)


def test_drawing_and_learning_stay_cheap_with_many_arms():
    """10,000 arms, the median of 50 rounds: a draw and an update of the bandit are to take less than 2 ms on one
    idle core; twice that passes here, where others use the core.
    """
    arms = 10_000
    for name in ("bernoulli", "fixed_size", "window", "depth"):
        design = build_scheme(SLSAMConfig(design=name, active_fraction=0.2), list(range(arms)))
        bandit = Bandit(arms, 0.2 * arms, SLSAMConfig(active_fraction=0.2))
        generator, norms = torch.Generator().manual_seed(0), torch.rand(arms, dtype=torch.float64)
        times = []
        for _ in range(50):
            start = time.process_time()
            mask = design(bandit.probabilities, generator)
            bandit.update(mask, norms, design.inclusion(bandit.probabilities))
            times.append(time.process_time() - start)
        assert sorted(times)[25] < 4e-3, name


def test_a_window_over_even_probabilities_is_contiguous():
    design, generator = design_of("window", 32), torch.Generator().manual_seed(0)
    p = torch.full((32,), 0.25, dtype=torch.float64)
    for _ in range(200):
        on = design(p, generator).nonzero().flatten()
        assert int(on[-1] - on[0]) + 1 == len(on)


@pytest.mark.parametrize("name", ["bernoulli", "fixed_size", "window", "depth", lambda p, g: p > 2])
def test_full_fraction_forces_every_arm(name):
    p = torch.nn.Parameter(torch.ones(3))
    arms = [Arm(str(i), (str(i),), (torch.nn.Parameter(p.detach().clone()),), (None,), i) for i in range(4)]
    name = (lambda q, g: torch.tensor([True, False, False, False])) if callable(name) else name
    slsam = SLSAM(arms, SLSAMConfig(design=name, active_fraction=1.0))

    def closure():
        loss = sum(arm.parameters[0].square().sum() for arm in arms)
        loss.backward()
        return loss

    slsam.update(closure)
    assert slsam.active.tolist() == [True] * 4


@pytest.mark.parametrize("mask", [torch.zeros(4, dtype=torch.bool), torch.ones(3, dtype=torch.bool), torch.ones(4)])
def test_a_callable_scheme_is_checked(mask):
    design = build_scheme(SLSAMConfig(design=lambda p, g: mask), [None] * 4)
    with pytest.raises(ValueError, match=r"boolean mask of shape \(4,\)"):
        design(torch.full((4,), 0.5, dtype=torch.float64), torch.Generator())


@pytest.mark.parametrize("name", ["window", "depth"])
def test_schemes_in_depth_need_a_depth(name):
    with pytest.raises(ValueError, match="needs arms with a depth"):
        build_scheme(SLSAMConfig(design=name), [0, None])


@pytest.mark.parametrize("name", ["window", "depth"])
def test_the_position_in_the_sequence_is_state(name):
    design, p, generator = design_of(name), uneven(), torch.Generator().manual_seed(0)
    for _ in range(3):
        design(p, generator)
    other = design_of(name)
    other.load_state_dict(design.state_dict())
    for _ in range(5):
        assert torch.equal(design(p, generator), other(p, torch.Generator()))
