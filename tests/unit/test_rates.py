"""Learning rates by parameter: each group's own, as they are now, and none where an optimizer keeps it to itself."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor, AdafactorSchedule

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.algorithm.sampa import Sampa
from slsam_peft.trainer.rates import LearningRates, check_rates
from tests.tiny import build, llama


def trainer_of(optimizer):
    return SimpleNamespace(optimizer=optimizer, state=SimpleNamespace(global_step=0))


def parameters():
    return [nn.Parameter(torch.ones(2)) for _ in range(3)]


def test_each_parameter_has_its_own_groups_rate_of_this_step():
    one, two, other = parameters()
    trainer = trainer_of(torch.optim.AdamW([{"params": [one], "lr": 0.01}, {"params": [two], "lr": 0.16}]))
    rates = LearningRates(trainer)
    assert [rates(p) for p in (one, two, other)] == [0.01, 0.16, 0.0]
    trainer.optimizer.param_groups[0]["lr"] = torch.tensor(0.5)  # some optimizers keep tensors
    trainer.state.global_step += 1
    assert [rates(p) for p in (one, two, other)] == [0.5, 0.16, 0.0]


def relative(lr=None, schedule=False):
    optimizer = Adafactor(parameters(), lr=lr, relative_step=True, warmup_init=True)
    if schedule:
        AdafactorSchedule(optimizer)
    return optimizer


def without():
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    return optimizer


class Prodigy(torch.optim.SGD):
    """What prodigyopt's and dadaptation's optimizers show of themselves: `lr` is multiplied by an estimate."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["d"] = 1e-6


OWN = {
    "Prodigy": lambda: Prodigy(parameters()),
    "Prodigy with a lower lr": lambda: Prodigy(parameters(), lr=1e-3),
    "Adafactor": relative,
    "Adafactor with its schedule, which says 0": lambda: relative(schedule=True),
    "Adafactor in a wrapper": lambda: SimpleNamespace(optimizer=(made := relative()), param_groups=made.param_groups),
    "SGD": without,
}


@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_that_makes_its_own_rate_is_named(name):
    optimizer = OWN[name]()
    with pytest.raises(ValueError, match=rf"{name.split()[0]} makes its own learning rate.*set lr"):
        LearningRates(trainer_of(optimizer))(optimizer.param_groups[0]["params"][0])
    with pytest.raises(ValueError, match=rf"{name.split()[0]} makes its own learning rate.*set lr"):
        check_rates(optimizer)


def test_an_optimizer_whose_rate_is_lr_is_not_refused():
    for cls in (torch.optim.AdamW, torch.optim.SGD):
        check_rates(cls(parameters(), lr=1.0))
    check_rates(Adafactor(parameters(), lr=1e-3, relative_step=False))


def rule(ascent, **settings):
    return SLSAMConfig(method="auto", ascent=ascent, trace=False, **settings)


@pytest.mark.parametrize("ascent", ["sampa", "bar", "obar", "bi_lora"])
def test_a_rule_that_moves_by_the_rate_is_refused_before_training(ascent, tmp_path):
    """And none of the others, nor plain training."""
    model = llama()
    trainer = build(SLSAMTrainer, tmp_path, rule(ascent), model=model, max_steps=1)
    trainer.optimizer = Prodigy([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"Prodigy makes its own learning rate.*lr=1\.0, d=1e-06, an estimate"):
        trainer.train()
    assert trainer.state.global_step == trainer.slsam.steps == 0


@pytest.mark.parametrize(
    "config",
    [SLSAMConfig(trace=False), rule(Sampa(1, extrapolate=False)), rule("bar", rho=0.0)],
    ids=["auto", "sampa at w", "without a radius"],
)
def test_what_reads_no_rate_trains_with_any_optimizer(config, tmp_path):
    model = llama()
    trainer = build(SLSAMTrainer, tmp_path, config, model=model, max_steps=1)
    trainer.optimizer = Prodigy([p for p in model.parameters() if p.requires_grad])
    trainer.train()
    assert trainer.slsam.steps == 1
