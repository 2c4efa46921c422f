"""Prompts, prefixes and what else PEFT trains outside the blocks: one arm per module, exact, trained by default."""

import logging

import peft
import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

from slsam_peft import SLSAM, SLSAMConfig, SLSAMTrainer, arms_of
from tests.decoders import adapted, batch, closures
from tests.families import batch_of, model_of
from tests.reference import assert_step_is_exact
from tests.tiny import build
from tests.tolerances import FIRST_ORDER

SHAPE = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
PROMPTS = {
    "prompt": peft.PromptTuningConfig(**SHAPE),
    "prefix": peft.PrefixTuningConfig(**SHAPE),
    "prefix, projected": peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **SHAPE),
    "p-tuning": peft.PromptEncoderConfig(encoder_hidden_size=8, **SHAPE),
    "p-tuning, recurrent": peft.PromptEncoderConfig(
        encoder_reparameterization_type="LSTM", encoder_hidden_size=8, **SHAPE
    ),
    "cartridge": peft.CartridgeConfig(num_frozen_tokens=0, **SHAPE),
    "multitask prompt": peft.MultitaskPromptTuningConfig(num_tasks=2, **SHAPE),
    "context-aware prompt": peft.CPTConfig(
        cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4], task_type="CAUSAL_LM"
    ),
}
TRAINED_BY_TRL = ("prompt", "prefix", "p-tuning")


def inputs_of(name):
    inputs = dict(batch())
    if name == "multitask prompt":
        inputs["task_ids"] = torch.arange(len(inputs["input_ids"])) % 2
    if name == "context-aware prompt":
        inputs["input_type_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def assert_steps_are_exact(model, inputs):
    arms = arms_of(model)
    positions = torch.arange(len(arms))
    for mask in (positions >= len(arms) // 2, positions % 2 == 0, positions == len(arms) - 1):
        for descent in ("active", "all"):
            settings = {"design": lambda p, g, m=mask: m, "active_fraction": 0.9} if len(arms) > 1 else {}
            config = SLSAMConfig(rho=0.3, descent=descent, **{"active_fraction": 1.0, **settings})
            assert_step_is_exact(SLSAM(arms, config), mask, *closures(model, inputs))


@pytest.mark.parametrize("name", PROMPTS)
def test_the_step_is_exact(name):
    model = adapted(PROMPTS[name])
    assert all(arm.depth is None for arm in arms_of(model))
    assert_steps_are_exact(model, inputs_of(name))


def test_prompts_of_encoder_decoders_too():
    model = model_of("bart", adapter=peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"))
    assert_steps_are_exact(model, batch_of("bart"))


def test_adaption_prompts_lie_in_blocks():
    model = adapted(peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"))
    arms = arms_of(model)
    assert [arm.depth for arm in arms] == [len(arms.blocks) - 2, len(arms.blocks) - 1]
    assert_steps_are_exact(model, batch())


def test_it_is_said_once_for_each_model(caplog):
    model = adapted(PROMPTS["prompt"])
    with caplog.at_level(logging.WARNING, logger="slsam_peft"):
        assert [arm.name for arm in arms_of(model)] == [arm.name for arm in arms_of(model, "module")]
        arms_of(model)
    assert [r.getMessage() for r in caplog.records] == [
        "PeftModelForCausalLM trains nothing in a stack of transformer blocks (prompts, prefixes and heads lie "
        "outside), so each of its trained modules is one arm, as with granularity='module', and passes are not cut."
    ]


@pytest.mark.parametrize("name", TRAINED_BY_TRL)
def test_the_trainer_trains_them_by_default(name, tmp_path):
    torch.manual_seed(0)
    options = {"peft_config": PROMPTS[name], "max_steps": 4, "activation_checkpointing": False}
    trainer = build(SLSAMTrainer, tmp_path, per_device_train_batch_size=3, **options)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    trained = {n for arm in trainer.slsam.arms for n in arm.parameter_names}
    assert {n for n in now if not torch.equal(now[n], before[n])} == trained
    assert trainer.slsam.skipped == 0


@pytest.mark.parametrize("name", TRAINED_BY_TRL)
def test_the_loss_of_the_ascents_sequences_is_theirs_behind_virtual_tokens(name, tmp_path):
    """Virtual tokens in front shift where a token's loss stands, and let the first one have a loss. To first order the
    loss of the ascent's sequences rises by rho |g|.
    """
    torch.manual_seed(0)
    config = SLSAMConfig(method="auto", ascent="partial", rho=0.01)
    rows = [{"text": " ".join(f"w{7 * i + j}" for j in range(8))} for i in range(6)]  # none is padded
    options = {"peft_config": PROMPTS[name], "max_steps": 1, "activation_checkpointing": False}
    options["data"] = Dataset.from_list(rows)
    trainer = build(SLSAMTrainer, tmp_path, config, per_device_train_batch_size=3, **options)
    trainer.train()
    assert trainer.slsam.metrics["ascent_gain"] == pytest.approx(1.0, abs=FIRST_ORDER)


@pytest.mark.parametrize("name", TRAINED_BY_TRL)
def test_as_many_tokens_count_as_the_loss_is_over(name, tmp_path):
    """Behind virtual tokens the batch's first one has a loss."""
    trainer = build(SLSAMTrainer, tmp_path, peft_config=PROMPTS[name], activation_checkpointing=False)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    scored = trainer.model(**inputs, fused_lm_head=True).label_mask.sum()
    assert trainer._make_passes().divisor.items(inputs) == scored


def test_without_a_radius_prompts_train_as_trl_does(tmp_path):
    options = {"peft_config": PROMPTS["prompt"], "activation_checkpointing": False}

    def trained(cls, folder, *config):
        torch.manual_seed(0)
        trainer = build(cls, tmp_path / folder, *config, **options)
        trainer.train()
        return [p for p in trainer.model.parameters() if p.requires_grad]

    plain, ours = trained(SFTTrainer, "plain"), trained(SLSAMTrainer, "ours", SLSAMConfig(rho=0.0))
    assert all(torch.equal(p, q) for p, q in zip(plain, ours, strict=True))
