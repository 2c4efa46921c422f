"""A new ascent, radius, bandit and sampling scheme: a few lines each, handed to `SLSAMConfig`, used by the trainer."""

import pytest
import torch

from slsam_peft import SLSAM, SLSAMConfig, SLSAMTrainer, arms_of
from slsam_peft.algorithm.ascents import Ahead, Ascent
from slsam_peft.algorithm.radius import Length, LossRise, Offsets, scaled
from tests.tiny import build
from tests.tolerances import EXACT_FLOAT64
from tests.unit.test_slsam import problem


class EveryOther(Ascent):
    """The whole batch, in every second step; the others are plain ones."""

    exact = True
    steps = 0

    def take(self, index, count, sequences, taken):
        if index == 0:
            self.steps += 1
        return self.steps % 2 * (1 if sequences is None else sequences)


class PerTensor:
    """Every tensor is moved by the same length along its own gradient."""

    def __init__(self, length):
        self.length = length

    def offsets(self, gradients, weights, norm, unit):
        return Offsets([self.length * g / g.norm() for g in gradients], torch.full_like(norm, self.length))


class Adaptive:
    """ASAM: lengths are measured in units of the weights."""

    def offsets(self, gradients, weights, norm, unit):
        moved = [w.square() * g for w, g in zip(weights, gradients, strict=True)]
        size = torch.stack([(w.abs() * g).norm() for w, g in zip(weights, gradients, strict=True)]).norm()
        return Offsets(scaled(moved, 0.1 / (size + 1e-12)), torch.full_like(norm, 0.1))


def softmax_bandit(probabilities, mask, norms, inclusion):
    """Probabilities in proportion to the norms just seen, the others as they were."""
    weights = torch.where(mask, norms / norms.sum() + 0.1, probabilities)
    return weights / weights.sum() * probabilities.sum()


def two_of_them(probabilities, generator):
    mask = torch.zeros(len(probabilities), dtype=torch.bool)
    mask[torch.multinomial(probabilities, 2, generator=generator)] = True
    return mask


def test_a_new_ascent():
    model, slsam, closure, calls = problem(ascent=EveryOther(), active_fraction=1.0, rho=0.2)
    passes = []
    for _ in range(4):
        calls.clear()
        slsam.update(closure)
        passes.append(len(calls))
        assert all(p.grad is not None for p in model.parameters())
        assert ("rho" in slsam.metrics) == (len(calls) == 2)
    assert passes == [2, 1, 2, 1]


def test_a_new_radius():
    """Exactly the gradient at w + e."""
    model, slsam, closure, _ = problem(radius=PerTensor(0.3), active_fraction=1.0)
    slsam.update(closure)
    got = [p.grad.clone() for p in model.parameters()]
    assert slsam.metrics["rho"] == 0.3
    twin, _, plain, _ = problem()
    plain()
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.3 * p.grad / p.grad.norm())
    twin.zero_grad()
    plain()
    for p, g in zip(twin.parameters(), got, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=EXACT_FLOAT64, atol=EXACT_FLOAT64)


def test_a_new_bandit_and_a_new_sampling_scheme():
    _, slsam, closure, _ = problem(bandit=softmax_bandit, design=two_of_them, active_fraction=2 / 3)
    before = slsam.probabilities.clone()
    for _ in range(3):
        slsam.update(closure)
        assert int(slsam.active.sum()) == 2
    assert not torch.equal(slsam.probabilities, before)
    assert float(slsam.probabilities.sum()) == pytest.approx(2.0)


RULES = {
    "ascent": {"ascent": EveryOther},
    "a known ascent as an object": {"ascent": lambda: Ahead(sequences=1)},
    "radius": {"radius": Adaptive},
    "bandit": {"bandit": lambda: softmax_bandit},
    "design": {"design": lambda: two_of_them},
}


@pytest.mark.parametrize("rule", RULES)
def test_new_rules_train_through_the_trainer(rule, tmp_path):
    settings = {name: make() for name, make in RULES[rule].items()}
    config = SLSAMConfig(method="auto", **settings)
    stored = config.to_dict()
    assert all(":" in stored[name] for name in settings)
    trainer = build(SLSAMTrainer, tmp_path, config)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trainer.slsam.steps == 3
    assert trainer.slsam.skipped == 0
    assert not all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert bool(trainer.slsam.runner.pairs) == (rule != "ascent"), "look-ahead rides by name and as an object"
    for name, value in settings.items():
        assert getattr(trainer.slsam.config, name) is value


@pytest.mark.parametrize("norm", [0.0, 1e-3, 2.0])
@pytest.mark.parametrize("unit", [1.0, 4.0])
def test_a_loss_rise_divides_by_the_gradient_of_the_mean_loss(norm, unit):
    """Up to the longest radius; a gradient of 0 moves nothing."""
    direction = torch.tensor([3.0, 4.0], dtype=torch.float64) / 5
    gradients = [norm * direction[:1], norm * direction[1:]]
    (first, second), rho = LossRise(0.3, 2.0).offsets(
        gradients, gradients, torch.tensor(norm, dtype=torch.float64), torch.tensor(unit, dtype=torch.float64)
    )
    expected = min(0.3 / (norm * unit), 2.0) if norm else 0.0
    assert float(rho) == pytest.approx(expected, rel=1e-9)
    assert torch.cat([first, second]).tolist() == pytest.approx((expected * direction).tolist(), rel=1e-8)


def test_a_length_is_kept_whatever_the_gradient_and_its_unit():
    gradients = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    offsets, rho = Length(0.2).offsets(gradients, gradients, norm, torch.tensor(7.0))
    assert float(rho) == 0.2
    assert float(torch.stack([e.norm() for e in offsets]).norm()) == pytest.approx(0.2, rel=EXACT_FLOAT64)
    torch.testing.assert_close(offsets[0] / offsets[0].norm(), gradients[0] / gradients[0].norm())


def test_random_numbers_of_a_step_are_never_those_of_the_step_before():
    """A part of the batch uses fewer of them than the whole, and the generator goes on behind the whole."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 1))
    x, masks = torch.randn(8, 16), []
    slsam = SLSAM(arms_of(model, "module"), SLSAMConfig(method="auto", ascent="partial"))

    def run(rows):
        masks.append(torch.rand(rows.shape))
        loss = model(rows * (masks[-1] > 0.5)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        slsam.update(lambda: run(x), lambda: run(x[:2]))
    assert [len(m) for m in masks] == [2, 8] * 3
    for part, whole in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(part, whole[:2]), "the ascent's sequences have the same dropout at w and at w + e"
    drawn = torch.cat([m.flatten() for m in masks[1::2]])
    assert len(drawn.unique()) == len(drawn)
