"""fp16: the bandit sees norms without the loss scale, and an overflow in either pass leaves everything as it was."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.adversary import Adversary
from slsam_peft.algorithm.balancing import Balancing
from slsam_peft.algorithm.noise import WeightNoise
from slsam_peft.algorithm.sampa import Sampa
from slsam_peft.algorithm.zeroth_order import ZerothOrder
from slsam_peft.trainer.factors import factors_of
from slsam_peft.trainer.riding import lora_pairs
from tests.decoders import batch, closures, decoder
from tests.look_ahead import exact_norms, look_ahead_passes
from tests.tolerances import LOSS_SCALE


class Run:
    """A training of a small network with torch's own gradient scaler."""

    def __init__(self, scale, growth_interval=10**6, **settings):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)]
        self.model = nn.Sequential(*layers).double()
        self.parameters = list(self.model.parameters())  # a pass at w + e has other tensors in their place
        self.x = torch.randn(8, 4, dtype=torch.float64)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        config = SLSAMConfig(**{"rho": 0.1, "active_fraction": 0.5, "design": "fixed_size", **settings})
        self.slsam = SLSAM(arms_of(self.model, "module"), config)
        self.slsam.loss_scale = lambda: self.scaler._scale
        self.scaler.scale(torch.zeros(()))  # makes the scale a tensor
        self.overflows = set()  # passes, counted from 1
        self.passes = 0

    def closure(self):
        self.passes += 1
        loss = (self.model(self.x) - 1).square().mean()
        self.scaler.scale(loss).backward()
        if self.passes in self.overflows:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.flatten()[0] = math.inf
        return loss

    def update(self):
        self.slsam.update(self.closure)
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("ascent", ["two_pass", "remembered"])
def test_training_does_not_depend_on_the_scale(ascent):
    """What is left is the 1e-12 in the denominator of e, which is not scaled."""
    assert_same_training(Run(1.0, ascent=ascent), Run(2.0**12, ascent=ascent))


@pytest.mark.parametrize("ascent", ["two_pass", "remembered"])
def test_training_does_not_depend_on_changes_of_the_scale(ascent):
    """The stale gradient of an arm may be from a step with another scale than its neighbour's."""
    growing = Run(2.0**12, growth_interval=2, ascent=ascent)
    assert_same_training(Run(1.0, ascent=ascent), growing)
    assert growing.scaler.get_scale() == 2.0**16


RATE = 0.2
RULES = {
    "bi_lora": partial(Adversary, 0.5, adam=False),  # Adam's step does not depend on the scale
    "flat_lora": partial(WeightNoise, 0.1),
    "bar": partial(Balancing, 0.5),
    "zeroth_order": ZerothOrder,
    "sampa": partial(Sampa, 1),
}


class RuleRun(Run):
    """A training of a decoder with adapters by a rule that is given what it needs."""

    def __init__(self, scale, ascent, growth_interval=10**6):
        super().__init__(scale, growth_interval)
        self.model = exact_norms(decoder(dropout=0.0))
        self.model.register_forward_hook(self.scale_gradients)
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=RATE)
        config = SLSAMConfig(method="auto", rho=0.1 if ascent.strength is None else None, ascent=ascent)
        arms, pairs = arms_of(self.model), lora_pairs(self.model)
        self.slsam = SLSAM(arms, config, pairs=pairs, factors=factors_of(self.model))
        self.slsam.loss_scale = lambda: self.scaler._scale
        self.slsam.learning_rate = lambda parameter: RATE
        one, two = batch(2, 9), batch(3, 11)
        self.batches = [one, two] * 5

    def scale_gradients(self, module, args, output):
        if output.logits.requires_grad:
            output.logits.register_hook(lambda gradient: gradient * self.scaler._scale.to(gradient))

    def update(self):
        own, coming = self.batches[self.slsam.steps : self.slsam.steps + 2]
        if self.slsam.ascent.rides:
            self.slsam.accumulate(look_ahead_passes(self.model, own, coming))
        else:
            closure, forward_only = closures(self.model, own)
            self.slsam.update(closure, forward_only=forward_only)
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_other_papers_do_not_depend_on_the_scale_nor_on_its_changes(rule):
    plain, growing = RuleRun(1.0, RULES[rule]()), RuleRun(2.0**12, RULES[rule](), growth_interval=2)
    before = plain.weights()
    assert_same_training(plain, growing)
    assert growing.scaler.get_scale() == 2.0**16
    assert not plain.slsam.skipped
    assert not all(torch.equal(p, w) for p, w in zip(before, plain.weights(), strict=True))
    state, other = plain.slsam.ascent.state_dict(), growing.slsam.ascent.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=LOSS_SCALE, atol=LOSS_SCALE)


def assert_same_training(plain, scaled):
    for _ in range(8):
        plain.update()
        scaled.update()
        assert torch.equal(scaled.slsam.active, plain.slsam.active)
        assert scaled.slsam.metrics == pytest.approx(plain.slsam.metrics, rel=LOSS_SCALE)
    torch.testing.assert_close(plain.slsam.probabilities, scaled.slsam.probabilities, rtol=LOSS_SCALE, atol=0)
    for p, q in zip(plain.weights(), scaled.weights(), strict=True):
        torch.testing.assert_close(p, q, rtol=LOSS_SCALE, atol=LOSS_SCALE)


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_an_overflow_skips_the_step_and_lowers_the_scale(bad_pass):
    run = Run(2.0**12)
    run.update()
    weights, probabilities = run.weights(), run.slsam.probabilities.clone()
    moments = {k: {n: v.clone() for n, v in s.items()} for k, s in run.optimizer.state_dict()["state"].items()}
    run.overflows = {2 + bad_pass}
    run.update()
    assert run.slsam.skipped == 1
    assert run.scaler.get_scale() == 2.0**11
    assert all(torch.equal(p, w) for p, w in zip(run.model.parameters(), weights, strict=True))
    assert torch.equal(run.slsam.probabilities, probabilities)
    now = run.optimizer.state_dict()["state"]
    assert now.keys() == moments.keys()
    assert all(torch.equal(now[k][n], v) for k, s in moments.items() for n, v in s.items())
    run.update()
    assert run.slsam.skipped == 1
    assert run.slsam.skipped_in_a_row == 0
    assert not all(torch.equal(p, w) for p, w in zip(run.model.parameters(), weights, strict=True))
