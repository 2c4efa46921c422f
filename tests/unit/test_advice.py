"""What is said once, when training starts: of what a step costs."""

import logging
from types import SimpleNamespace

import pytest

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.cost.expected import rule_of
from slsam_peft.cost.model import CostModel
from slsam_peft.trainer.advice import advise
from slsam_peft.trainer.riding import lora_pairs
from tests.decoders import decoder

ABOUT = 0.05  # of a plain step
SAID = {
    "small pass": ({"ascent": "partial"}, False, 1.25, "a small pass of its own"),
    "small pass, checkpointed": ({"ascent": "partial"}, True, 1.25, "a small pass of its own"),
    "forwards": ({"ascent": "zeroth_order"}, False, 1.25, "2 forward passes of its own, which keep nothing"),
    "forwards, checkpointed": ({"ascent": "zeroth_order"}, True, 1.17, "2 forward passes of its own"),
}


def trainer_of(checkpointing):
    args = SimpleNamespace(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        gradient_checkpointing=checkpointing,
        max_steps=0,
        num_train_epochs=3,
    )
    return SimpleNamespace(args=args)


@pytest.mark.parametrize(("settings", "checkpointing", "cost", "where"), SAID.values(), ids=SAID)
def test_a_steps_cost_is_said_as_it_is_counted(settings, checkpointing, cost, where, caplog):
    """To a twentieth: what factors and attention cost, which is not the same forwards and backwards, is left out."""
    model = decoder("llama", dropout=0.0, r=1)
    config = SLSAMConfig(method="auto", active_fraction=1.0, **settings)
    slsam = SLSAM(arms_of(model), config, pairs=lora_pairs(model))
    with caplog.at_level(logging.INFO, logger="slsam_peft"):
        advise(trainer_of(checkpointing), slsam)
    said = caplog.records[0].getMessage()
    assert f"1 of the 4 sequences of a step make its ascent: a step costs about {cost} plain LoRA steps" in said
    assert where in said
    counted = CostModel.from_model(model, checkpointing=checkpointing)
    ratio = counted.ratio([True] * len(counted), [(4, 64)], rule_of(config, rides=False))
    assert ratio == pytest.approx(cost, abs=ABOUT)


def test_nothing_is_said_of_rules_without_an_ascent(caplog):
    model = decoder("llama", dropout=0.0)
    slsam = SLSAM(arms_of(model), SLSAMConfig(method="sam"))
    with caplog.at_level(logging.INFO, logger="slsam_peft"):
        advise(trainer_of(False), slsam)
    assert not caplog.records
