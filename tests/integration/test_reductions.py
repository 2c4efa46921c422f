"""Without a radius and with every arm active SL-SAM is plain training: bit for bit, weights and logs."""

from itertools import product

import pytest
import torch
from trl import SFTTrainer

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.presets import METHODS
from tests.sft import train
from tests.tiny import build, texts
from tests.tolerances import FUSED_HEAD

TIMES = ("runtime", "per_second", "slsam")


def logs(trainer):
    return [{k: v for k, v in log.items() if not any(t in k for t in TIMES)} for log in trainer.state.log_history]


# Each kind of checkpointing, accumulation and packing always, all of their combinations in the slow run.
ALWAYS = (("none", 3, False), ("kept", 1, True), ("reentrant", 3, True))
CHECKPOINTING = {"none": False, "kept": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}
PLAIN_TRAININGS = [
    pytest.param(CHECKPOINTING[kind], *others, marks=[] if (kind, *others) in ALWAYS else pytest.mark.slow)
    for kind, *others in product(CHECKPOINTING, (1, 3), (False, True))
]


@pytest.mark.parametrize(("checkpointing", "accumulation", "packing"), PLAIN_TRAININGS)
def test_no_radius_and_all_arms_is_plain_training_bitwise(checkpointing, accumulation, packing, tmp_path):
    settings = {
        "gradient_accumulation_steps": accumulation,
        "activation_checkpointing": bool(checkpointing),
        "activation_checkpointing_kwargs": checkpointing or None,
        "packing": packing,
        "max_length": 32,
    }
    plain = train(SFTTrainer, tmp_path / "plain", **settings)
    ours = train(SLSAMTrainer, tmp_path / "ours", SLSAMConfig(rho=0.0, active_fraction=1.0), **settings)
    for (name, p), q in zip(plain.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert logs(plain) == logs(ours)
    assert ours.slsam.steps == 3


IN_SHORT = ("auto", "paper", "depth", "bi_lora")  # the others in the slow run


@pytest.mark.parametrize("method", [m if m in IN_SHORT else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_no_radius_is_plain_training_under_every_method(method, tmp_path):
    """Whatever a method samples, and whichever ascent it names: without a radius there is none, and nothing rides."""
    settings = {"per_device_train_batch_size": 3, "max_steps": -1, "num_train_epochs": 2, "data": texts(10)}
    plain = build(SFTTrainer, tmp_path / "plain", **settings)
    ours = build(SLSAMTrainer, tmp_path / "ours", SLSAMConfig(method=method, rho=0), **settings)
    plain.train()
    ours.train()
    assert ours.slsam.active.all()
    assert not ours.slsam.runner.pairs
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), ours.model.parameters(), strict=True))
    assert logs(plain) == logs(ours)


def test_no_radius_and_no_look_ahead(tmp_path):
    plain = build(SFTTrainer, tmp_path / "plain")
    ours = build(SLSAMTrainer, tmp_path / "ours", SLSAMConfig(rho=0.0, ascent="ahead", active_fraction=1.0))
    plain.train()
    ours.train()
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), ours.model.parameters(), strict=True))
    assert logs(plain) == logs(ours)


def test_short_last_groups_and_epochs_are_those_of_plain_training(tmp_path):
    """Eleven sequences are six micro-batches of up to two; a step of four is followed by one of two, in each epoch."""
    settings = {"gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 2, "data": texts(11)}
    plain = build(SFTTrainer, tmp_path / "plain", **settings)
    ours = build(SLSAMTrainer, tmp_path / "ours", SLSAMConfig(rho=0.0, active_fraction=1.0), **settings)
    plain.train()
    ours.train()
    assert plain.state.global_step == ours.state.global_step == ours.slsam.steps == 4
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), ours.model.parameters(), strict=True))
    assert logs(plain) == logs(ours)


def test_training_without_adapters_is_plain_training(tmp_path):
    plain = build(SFTTrainer, tmp_path / "plain", peft_config=None)
    ours = build(SLSAMTrainer, tmp_path / "ours", SLSAMConfig(rho=0.0, active_fraction=1.0), peft_config=None)
    plain.train()
    ours.train()
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), ours.model.parameters(), strict=True))
    assert logs(plain) == logs(ours)


def test_reported_loss_accuracy_entropy_and_tokens_are_those_of_plain_training(tmp_path):
    """In the first step the weights are equal; the second pass must not count."""
    plain = train(SFTTrainer, tmp_path / "plain", gradient_accumulation_steps=2)
    config = SLSAMConfig(rho=0.1, method="sam")
    ours = train(SLSAMTrainer, tmp_path / "ours", config, gradient_accumulation_steps=2)
    for key in ("loss", "mean_token_accuracy", "entropy", "num_tokens"):
        assert plain.state.log_history[0][key] == ours.state.log_history[0][key]
        assert all(key in log for log in ours.state.log_history[:3])
    assert plain.state.log_history[2]["num_tokens"] == ours.state.log_history[2]["num_tokens"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"descent": "all", "design": "depth"}, pytest.param({"granularity": "module"}, marks=pytest.mark.slow)],
)
def test_four_micro_batches_of_two_are_one_of_eight(settings, tmp_path):
    """Through SFTTrainer, with sequences of unequal length and the loss normalised by the step's tokens."""
    config = SLSAMConfig(rho=0.1, active_fraction=0.6, **settings)
    split = train(
        SLSAMTrainer, tmp_path / "a", config, double=True, dropout=0.0, gradient_accumulation_steps=4, optim="sgd"
    )
    whole = train(
        SLSAMTrainer, tmp_path / "b", config, double=True, dropout=0.0, per_device_train_batch_size=8, optim="sgd"
    )
    assert torch.equal(split.slsam.active, whole.slsam.active)
    for p, q in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=FUSED_HEAD, atol=FUSED_HEAD)
    torch.testing.assert_close(split.slsam.probabilities, whole.slsam.probabilities, rtol=FUSED_HEAD, atol=FUSED_HEAD)


def test_an_ascent_on_a_sequence_is_one_on_a_micro_batch(tmp_path):
    """Paid for by a sequence or by a micro-batch, it is the same training: its first sequence makes the ascent."""
    config = SLSAMConfig(rho=0.5, ascent="partial", ascent_fraction=0.34, active_fraction=1.0)
    common = {"double": True, "dropout": 0.0, "optim": "sgd"}
    rows = train(SLSAMTrainer, tmp_path / "a", config, per_device_train_batch_size=3, **common)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    micro_batches = train(SLSAMTrainer, tmp_path / "b", config, **parts, **common)
    for p, q in zip(rows.model.parameters(), micro_batches.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=FUSED_HEAD, atol=FUSED_HEAD)
    torch.testing.assert_close(rows.slsam.norms, micro_batches.slsam.norms, rtol=FUSED_HEAD, atol=FUSED_HEAD)
