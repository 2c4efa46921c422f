"""fp16 through the trainer: gradients carry the loss scale, the bandit's norms do not, an overflow changes nothing.

accelerate starts a gradient scaler on accelerators only. Here it is given torch's own one for the CPU, and runs the
model under float16 autocast on it; everything else is what it does on a GPU.
"""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.algorithm.adversary import Adversary
from slsam_peft.algorithm.slsam import SLSAM
from tests.tiny import build, lora
from tests.tolerances import FLOAT16
from tests.watch import clones

CONFIG = SLSAMConfig(rho=0.1, active_fraction=0.5, design="fixed_size")


class Half(SLSAMTrainer):
    """Notes what each step found and left."""

    scale = 1.0
    growth_interval = 10**6

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        growth = {"init_scale": self.scale, "growth_interval": self.growth_interval}
        self.accelerator.scaler = torch.amp.GradScaler("cpu", **growth)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.seen = []

    def training_step(self, *args, **kwargs):
        moments = copy.deepcopy(self.optimizer.optimizer.state_dict()["state"])
        before = (clones(self.model, True), self.slsam.probabilities.clone(), moments)
        loss = super().training_step(*args, **kwargs)
        self.seen.append((before, self.slsam.active.clone(), dict(self.slsam.metrics), self.slsam.skipped))
        return loss


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return a function that trains with a given first loss scale."""
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "no")

    def run(scale, steps=4, config=CONFIG, growth_interval=10**6, **settings):
        cls = type("Half", (Half,), {"scale": scale, "growth_interval": growth_interval})
        adapter = lora(target_modules=["q_proj", "down_proj"])
        settings = {"max_steps": steps, "weight_decay": 0.1, "max_grad_norm": 1.0, **settings}
        trainer = build(cls, tmp_path / str(scale), config, peft_config=adapter, **settings)
        try:
            trainer.train()
        finally:
            AcceleratorState._reset_state()
        return trainer

    return run


def test_the_scale_does_not_move_the_trajectory(train):
    """Powers of two shift exponents; what is left is float16's range at its lower end."""
    assert_same_training(train(2.0**8), train(2.0**14))


CHANGES = ["two_pass", "remembered", pytest.param(Adversary(adam=False), marks=pytest.mark.slow, id="bi_lora")]


@pytest.mark.parametrize("ascent", CHANGES)
def test_changes_of_the_scale_do_not_move_the_trajectory(ascent, train):
    """It doubles every second step; the stale gradient of an arm may be older than the last change."""
    config = replace(CONFIG, ascent=ascent, rho=1.0)
    constant, growing = train(2.0**10, 8, config), train(2.0**8, 8, config, growth_interval=2)
    assert growing.accelerator.scaler.get_scale() == 2.0**12
    assert_same_training(constant, growing)


def assert_same_training(low, high):
    assert low.slsam.skipped == high.slsam.skipped == 0
    for one, two in zip(low.seen, high.seen, strict=True):
        assert torch.equal(one[1], two[1])
        assert two[2]["grad_norm_ascent"] == pytest.approx(one[2]["grad_norm_ascent"], rel=FLOAT16)
        if "sharpness" in one[2]:
            assert two[2]["sharpness"] == pytest.approx(one[2]["sharpness"], rel=FLOAT16)
        assert one[2]["grad_norm_ascent"] < 10, "a norm that carries the scale is in the hundreds"
    torch.testing.assert_close(low.slsam.probabilities, high.slsam.probabilities, rtol=FLOAT16, atol=0)
    logged = [[log["grad_norm"] for log in t.state.log_history if "grad_norm" in log] for t in (low, high)]
    assert logged[0] == pytest.approx(logged[1], rel=FLOAT16)


def test_an_overflow_leaves_everything_as_it_was(train):
    """A scale far too large: steps are skipped and it is halved until gradients are finite."""
    trainer = train(2.0**22, steps=9)
    skipped = trainer.slsam.skipped
    assert 0 < skipped < 9
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (22 - skipped)
    (weights, probabilities, moments), *_ = trainer.seen[0]
    first = next(i for i, seen in enumerate(trainer.seen) if seen[3] == i)  # step that was not skipped
    assert first >= 2
    (after, learnt, moments_after), *_ = trainer.seen[first]
    assert all(torch.equal(after[n], w) for n, w in weights.items())
    assert torch.equal(probabilities, learnt)
    assert moments == {}  # what fused AdamW has made by then is zero
    assert not any(value.any() for state in moments_after.values() for value in state.values())
    assert any(not torch.equal(p, after[n]) for n, p in clones(trainer.model, True).items())
    assert trainer.slsam.skipped_in_a_row == 0


def test_idle_steps_leave_the_scale_alone(train, monkeypatch):
    """A step in which nothing drawn took part has no gradient, which a gradient scaler takes for an overflow."""
    monkeypatch.setattr(SLSAM, "_is_idle", lambda self, numbers: self.steps < 3)
    trainer = train(2.0**10, steps=5)
    assert trainer.slsam.skipped == 3
    assert trainer.accelerator.scaler.get_scale() == 2.0**10
    (weights, *_), *_ = trainer.seen[0]
    (after, *_), *_ = trainer.seen[3]
    assert all(torch.equal(after[n], w) for n, w in weights.items())
    assert any(not torch.equal(p, after[n]) for n, p in clones(trainer.model, True).items())
