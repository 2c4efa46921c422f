"""Learning rates by parameter: each group's own, as they are now, and none where an optimizer keeps it to itself."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor, AdafactorSchedule

from slsam_peft.trainer.rates import LearningRates


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


OWN = {
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
