"""The sampler: draws made early learn as they were drawn, full information is used, and its state is complete."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from slsam_peft import SLSAMConfig
from slsam_peft.algorithm.bandit import Bandit, paper_update
from slsam_peft.algorithm.projection import project_with_min_probability
from slsam_peft.algorithm.sampler import Sampler
from slsam_peft.algorithm.sampling import Depth
from tests.tolerances import BANDIT_SCALE, EXACT_FLOAT64, SUM

RECORDED = Path(__file__).parent / "data" / "block_norms.safetensors"  # see tests/record_norms.py
ARMS, SHARE, ROUNDS = 30, 0.25, 64
DESIGNS = ("bernoulli", "fixed_size", "window", "depth")


def sampler_of(arms=ARMS, share=SHARE, **settings):
    return Sampler(list(range(arms)), share * arms, SLSAMConfig(active_fraction=share, **settings))


def recorded():
    """Return the norms of 30 blocks in 128 steps of SmolLM2-135M, float64, shape `(128, 30)`."""
    with safe_open(RECORDED, "pt") as file:
        return file.get_tensor("norms").double()


def gained(p, squares, share=SHARE, minimum=0.1):
    """Return how far sum a^2 / p has fallen: 0 where every p is the share, 1 at its least.

    The sum and the minimum of p are given; the least is then where p is in proportion to a, clipped to
    [minimum * share, 1].
    """
    optimum = project_with_min_probability(squares.sqrt(), share * len(squares), minimum * share)
    even = torch.full_like(p, share)
    at = [float((squares / q).sum()) for q in (even, p, optimum)]
    return (at[0] - at[1]) / (at[0] - at[2])


def trained(sampler, norms, every_arm):
    """Let a sampler learn from recorded norms, of every arm or of those it draws."""
    for row in norms:
        draw = sampler.draw()
        sampler.learn(draw, torch.ones_like(draw.mask) if every_arm else draw.mask, row)
    return sampler.probabilities


# Draws.


@pytest.mark.parametrize("design", DESIGNS)
def test_draws_made_early_are_the_draws_of_the_same_generator(design):
    early, late = (sampler_of(design=design, bandit="uniform", seed=3) for _ in range(2))
    for _ in range(20):
        held = early.draw_ahead()
        assert early.draw_ahead() is held
        assert early.upcoming is held
        here, there = early.draw(), late.draw()
        assert here is held
        assert early.upcoming is None
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("design", DESIGNS)
def test_a_draw_says_what_it_was_drawn_with(design):
    sampler = sampler_of(design=design)
    trained(sampler, recorded()[:5], every_arm=True)
    draw = sampler.draw()
    assert torch.equal(draw.probabilities, sampler.probabilities)
    assert torch.equal(draw.inclusion, sampler.scheme.inclusion(sampler.probabilities))
    assert draw.mask.dtype == torch.bool
    assert draw.mask.any()


def test_a_mean_of_one_draws_every_arm_and_moves_the_generator_all_the_same():
    sampler = sampler_of(share=1.0)
    start = sampler.generator.get_state()
    assert sampler.draw().mask.all()
    assert not torch.equal(sampler.generator.get_state(), start)
    assert sampler.mean == 1.0


# Learning.


def test_the_papers_rule_estimates_with_the_probabilities_that_it_drew_with():
    """`ahead` draws a step early and learns in between."""
    ahead, norms = sampler_of(bandit="paper"), 0.1 * recorded()
    first = ahead.draw()
    second = ahead.draw_ahead()
    ahead.learn(first, first.mask, norms[0])
    current = ahead.probabilities
    assert not torch.equal(current, second.probabilities)
    expected = paper_update(current, second.mask, norms[1], SHARE * ARMS, second.probabilities)
    assert not torch.allclose(expected, paper_update(current, second.mask, norms[1], SHARE * ARMS, current))
    ahead.learn(ahead.draw(), second.mask, norms[1])
    assert torch.equal(ahead.probabilities, expected)


def test_the_scale_free_rule_estimates_with_the_probabilities_that_it_drew_with():
    config, generator = SLSAMConfig(active_fraction=SHARE), torch.Generator().manual_seed(0)
    drawn = torch.rand(ARMS, dtype=torch.float64, generator=generator) + 0.1
    drawn *= SHARE * ARMS / drawn.sum()
    mask, norms = torch.arange(ARMS) % 3 == 0, recorded()[0]
    bandit = Bandit(ARMS, SHARE * ARMS, config)
    before = bandit.probabilities
    bandit.update(mask, norms, drawn, drawn)
    ratio = norms[mask] / drawn[mask]
    weights = before.clone()
    weights[mask] *= torch.exp(config.bandit_rate * SHARE * (ratio / ratio.max()) ** 2 / drawn[mask])
    expected = project_with_min_probability(weights, SHARE * ARMS, bandit.minimum)
    torch.testing.assert_close(bandit.probabilities, expected, rtol=0, atol=EXACT_FLOAT64)
    other = Bandit(ARMS, SHARE * ARMS, config)
    other.update(mask, norms, drawn)
    assert not torch.allclose(other.probabilities, expected)


@pytest.mark.parametrize("rule", ["paper", "scale_free"])
def test_drawn_left_out_is_the_current_probabilities(rule):
    a, b = (Bandit(ARMS, SHARE * ARMS, SLSAMConfig(active_fraction=SHARE, bandit=rule)) for _ in range(2))
    for row in recorded()[:20]:
        mask = row > row.median()
        a.update(mask, row, a.probabilities)
        b.update(mask, row, b.probabilities, b.probabilities)
    assert torch.equal(a.probabilities, b.probabilities)


def told(sampler, draw, seen):
    """Return the mask and inclusion that a callable rule is told of; `None` where it is not asked."""
    got = []
    sampler.bandit.rule = lambda p, mask, norms, inclusion: got.append((mask, inclusion)) or p
    sampler.learn(draw, seen, torch.ones(len(seen), dtype=torch.float64))
    return got[0] if got else None


def test_what_a_rule_is_told():
    sampler = sampler_of(4, 0.5, bandit=lambda p, mask, norms, inclusion: p)
    draw = sampler.draw()._replace(mask=torch.tensor([True, False, True, False]))
    everything = torch.ones(4, dtype=torch.bool)
    mask, inclusion = told(sampler, draw, everything)
    assert mask.all()
    assert inclusion.tolist() == [1.0] * 4
    mask, inclusion = told(sampler, draw, draw.mask)
    assert torch.equal(mask, draw.mask)
    assert torch.equal(inclusion, draw.inclusion)
    # The last arm is trained and had no gradient.
    mask, inclusion = told(sampler, draw, torch.tensor([True, True, True, False]))
    assert mask.tolist() == [True, True, True, False]
    assert inclusion.tolist() == [1.0] * 4
    # All were drawn by chance: their inclusion was what it was.
    assert torch.equal(told(sampler, draw._replace(mask=everything), everything)[1], draw.inclusion)
    assert told(sampler, draw, torch.zeros(4, dtype=torch.bool)) is None


def test_a_step_without_gradients_teaches_nothing():
    sampler = sampler_of()
    draw, zeros = sampler.draw(), torch.zeros(ARMS, dtype=torch.float64)
    for seen in (draw.mask, torch.ones_like(draw.mask)):
        sampler.learn(draw, seen, zeros)
        assert torch.equal(sampler.probabilities, torch.full_like(zeros, SHARE))


def test_the_papers_rule_learns_from_drawn_arms_alone():
    some, every = sampler_of(bandit="paper"), sampler_of(bandit="paper")
    norms = recorded()[:20]
    assert torch.equal(trained(some, norms, every_arm=False), trained(every, norms, every_arm=True))


# Full information.


def test_the_norms_say_where_they_come_from():
    with safe_open(RECORDED, "pt") as file:
        source = json.loads(file.metadata()["source"])
        assert file.get_tensor("norms").shape == (source["steps"], ARMS)
    assert source["model"] == "SmolLM2-135M-Instruct"
    assert source["steps"] >= 100


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_full_information_gains_most_of_what_there_is_within_64_steps(share):
    """The optimum is that of the mean squared norms of all 128 steps; then of those that come after the 64."""
    norms = recorded()
    sampler = sampler_of(share=share)
    p = trained(sampler, norms[:ROUNDS], every_arm=True)
    assert gained(p, norms.square().mean(0), share) >= 0.8
    assert gained(p, norms[ROUNDS:].square().mean(0), share) >= 0.7
    assert float(p.min()) >= 0.1 * share - SUM
    assert float(p.sum()) == pytest.approx(share * ARMS, abs=SUM)
    feedback = trained(sampler_of(share=share), norms[:ROUNDS], every_arm=False)
    assert gained(feedback, norms.square().mean(0), share) < 0.5


@pytest.mark.parametrize("power", [-41, -3, 5, 30])
def test_full_information_has_no_scale(power):
    norms = recorded()[:ROUNDS]
    p = trained(sampler_of(), norms, every_arm=True)
    assert torch.equal(trained(sampler_of(), 2.0**power * norms, every_arm=True), p)
    other = trained(sampler_of(), 0.0371 * norms, every_arm=True)
    torch.testing.assert_close(other, p, rtol=BANDIT_SCALE, atol=0)


def test_one_odd_step_does_not_decide():
    """One step of a hundred times the length, all of it in one arm: what was learnt before still counts."""
    norms = recorded()[:ROUNDS].clone()
    norms[-10] = 0.0
    norms[-10, 3] = 100 * recorded()[:ROUNDS].norm(dim=1).median()
    usual, odd = (trained(sampler_of(), rows, every_arm=True) for rows in (recorded()[:ROUNDS], norms))
    rest = torch.arange(ARMS) != 3
    assert odd[3] > usual[3]
    assert float(torch.corrcoef(torch.stack([odd[rest], usual[rest]]))[0, 1]) > 0.9
    assert float(odd[rest].min()) > 1.5 * 0.1 * SHARE


@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_arms_without_gradients_get_least(minimum):
    sampler = sampler_of(4, 0.5, min_probability=minimum)
    draw = sampler.draw()._replace(mask=torch.tensor([True, False, False, False]))
    sampler.learn(draw, torch.ones(4, dtype=torch.bool), torch.tensor([0.0, 0.0, 0.0, 2.0], dtype=torch.float64))
    p = sampler.probabilities  # the budget of 2 is more than one arm can take
    assert float(p.sum()) == pytest.approx(2.0, abs=SUM)
    assert p[3] == 1.0
    torch.testing.assert_close(p[:3], torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=SUM)


def test_a_step_that_draws_every_arm_counts_like_the_others():
    few = sampler_of(3, 0.6)
    norms = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    everything = torch.ones(3, dtype=torch.bool)
    for mask in ([True, False, False], [True, True, True]):
        few.learn(few.draw()._replace(mask=torch.tensor(mask)), everything, norms)
        torch.testing.assert_close(few.probabilities[0] * 2, few.probabilities[1], rtol=0, atol=SUM)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.operations += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("every_arm", [True, False])
def test_drawing_and_learning_take_few_operations(every_arm):
    """What a step of 30 numbers costs is launches, and the model's own step is not to be slowed by them."""
    sampler, rows = sampler_of(), list(recorded()[:20])
    with Counting() as counted:
        trained(sampler, rows, every_arm)
    assert 0 < counted.operations / len(rows) <= 60


# Depth.


def even_depth(arms, share):
    return Depth(list(range(arms)), 0.1), torch.full((arms,), share, dtype=torch.float64)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_depth_follows_the_probabilities(share):
    """A bandit that has learnt makes draws in depth order better than even ones, by what their order allows."""
    squares = recorded().square().mean(0)
    scheme, even = even_depth(ARMS, share)
    p = project_with_min_probability(squares.sqrt(), share * ARMS, 0.1 * share)
    at_even, at_p = (scheme.inclusion(q).clone() for q in (even, p))
    assert float(at_p.sum()) == pytest.approx(share * ARMS, rel=1e-5)
    assert float(at_p.min()) >= 0.1 * share - SUM
    assert bool((at_p.diff() >= 0).all())
    assert float((squares / at_p).sum()) < 0.95 * float((squares / at_even).sum())
    # One arm in the middle that is asked for more is reached more often.
    raised = even.clone()
    raised[ARMS // 2] *= 3
    raised *= share * ARMS / raised.sum()
    assert scheme.inclusion(raised)[ARMS // 2] > 1.2 * at_even[ARMS // 2]


def test_depth_of_nearly_even_probabilities_is_that_of_even_ones():
    scheme, even = even_depth(ARMS, SHARE)
    at_even = scheme.inclusion(even).clone()
    nearly = even + 1e-9 * torch.linspace(-1, 1, ARMS, dtype=torch.float64)
    torch.testing.assert_close(scheme.inclusion(nearly), at_even, rtol=1e-5, atol=0)


@pytest.mark.parametrize("arms", [1, 2, 9])
def test_depth_takes_probabilities_that_have_vanished(arms):
    p = torch.zeros(arms, dtype=torch.float64)
    p[0] = 1.0
    stated = Depth(list(range(arms)), 0.0).inclusion(p)
    assert bool(((stated >= 0) & (stated <= 1)).all())
    assert stated[-1] == 1.0


# State.


def played(sampler, steps=5):
    norms = recorded()
    draws = []
    for i in range(steps):
        draw = sampler.draw()
        draws.append(draw)
        sampler.draw_ahead()
        sampler.learn(draw, torch.ones_like(draw.mask) if i % 2 else draw.mask, norms[i])
    return draws


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("bandit", ["scale_free", "paper"])
def test_a_sampler_goes_on_bit_for_bit(design, bandit, held):
    sampler, other = (sampler_of(design=design, bandit=bandit, seed=seed) for seed in (0, 1))
    played(sampler)
    if not held:
        sampler.draw()
    else:
        other.draw()
    saved = sampler.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    assert any(key.startswith("upcoming.") for key in saved) is held
    kept = {key: value.clone() for key, value in saved.items()}
    other.load_state_dict(saved)
    for a, b in zip(played(sampler), played(other), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(torch.equal(saved[key], kept[key]) or saved[key].isnan().any() for key in saved)


BREAKS = {
    "no generator": lambda s: s.pop("generator"),
    "generator": lambda s: s.update(generator=torch.zeros(3, dtype=torch.uint8)),
    "fewer arms": lambda s: s.update({"bandit.probabilities": torch.full((4,), 0.5, dtype=torch.float64)}),
    "no scale": lambda s: s.pop("bandit.scale"),
    "squares": lambda s: s.update({"bandit.squares": torch.full((ARMS,), float("nan"))}),
    "budget": lambda s: s.update({"bandit.budget": torch.tensor(-1.0)}),
    "no draws": lambda s: s.pop("design.draws"),
    "start": lambda s: s.update({"design.start": torch.tensor(7.0)}),
    "another scheme": lambda s: [s.pop("design.draws"), s.pop("design.start")],
    "half a draw": lambda s: s.pop("upcoming.inclusion"),
    "a shorter draw": lambda s: s.update({"upcoming.mask": torch.ones(3, dtype=torch.bool)}),
    "an empty draw": lambda s: s.update({"upcoming.mask": torch.zeros(ARMS, dtype=torch.bool)}),
    "foreign": lambda s: s.update(steps=torch.tensor(1)),
    "no tensor": lambda s: s.update({"bandit.scale": None}),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_state_that_does_not_fit_changes_nothing(broken):
    sampler, other = (sampler_of(design="depth", seed=seed) for seed in (0, 1))
    played(sampler)
    played(other, 3)
    state = sampler.state_dict()
    BREAKS[broken](state)
    before, held = other.state_dict(), other.upcoming
    with pytest.raises(ValueError, match="the sampler's state does not fit: .*start without it"):
        other.load_state_dict(state)
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert other.upcoming is held


class Alternating:
    """A scheme of a user: even arms, then odd ones, at last the other way round; it counts its draws."""

    def __init__(self):
        self.drawn = 0

    def __call__(self, probabilities, generator):
        self.drawn += 1
        return torch.arange(len(probabilities)) % 2 == self.drawn % 2

    def inclusion(self, probabilities):
        return torch.full_like(probabilities, 0.5)

    def state_dict(self):
        return {"drawn": torch.tensor(self.drawn)}

    def load_state_dict(self, state):
        self.drawn = int(state["drawn"])


class Last:
    """A rule of a user: most for the arm that had the largest norm two steps ago."""

    def __init__(self):
        self.before = torch.zeros(())

    def __call__(self, probabilities, mask, norms, inclusion):
        p = torch.full_like(probabilities, 0.2)
        p[int(self.before)] = 0.9
        self.before = norms.argmax()
        return p

    def state_dict(self):
        return {"before": self.before}

    def load_state_dict(self, state):
        self.before = state["before"]


def test_objects_of_a_user_state_their_inclusion_and_keep_their_state():
    sampler, other = (sampler_of(design=Alternating(), bandit=Last()) for _ in range(2))
    draws = played(sampler)
    assert draws[0].inclusion.tolist() == [0.5] * ARMS
    other.load_state_dict(sampler.state_dict())
    for a, b in zip(played(sampler), played(other), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    plain = sampler_of(design=lambda p, generator: p > 0, bandit=Last())
    with pytest.raises(ValueError, match="its sampling scheme kept"):
        plain.load_state_dict(sampler.state_dict())


def test_inclusion_that_a_user_states_is_checked():
    class Wrong(Alternating):
        def inclusion(self, probabilities):
            return torch.full_like(probabilities, 1.5)

    with pytest.raises(ValueError, match=f"{ARMS} numbers in"):
        sampler_of(design=Wrong()).draw()
