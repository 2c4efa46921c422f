"""fp16: the bandit sees norms without the loss scale, and an overflow in either pass leaves everything as it was."""

import math

import pytest
import torch
from torch import nn

from slsam_peft import SLSAM, SLSAMConfig, arms_of
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
