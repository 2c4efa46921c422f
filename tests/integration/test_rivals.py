"""Rules of other papers through SFTTrainer: accumulation, checkpointing, 4-bit bases, resume and what is saved."""

import json

import pytest
import torch
from peft import PeftModel
from trl import SFTTrainer

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.config import RECORD_NAME
from tests.resume_worker import base
from tests.tiny import build, llama, lora

ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
CHECKPOINTED = {"activation_checkpointing": True}
REENTRANT = {**CHECKPOINTED, "activation_checkpointing_kwargs": {"use_reentrant": True}}

CASES = {
    "asam": ({"method": "auto", "radius": "asam"}, {}, False),
    "weight": ({"method": "auto", "radius": "weight"}, REENTRANT, True),
    "zeroth_order": ({"method": "auto", "ascent": "zeroth_order"}, {**ONE_BY_ONE, **CHECKPOINTED}, True),
    "sampa": ({"method": "auto", "ascent": "sampa"}, REENTRANT, True),
    "bar": ({"method": "bar"}, {**ONE_BY_ONE, **REENTRANT}, True),
    "bi_lora": ({"method": "bi_lora", "rho": 0.02}, {**ONE_BY_ONE, **REENTRANT}, True),
    "bi_lora, drawn": ({"method": "auto", "ascent": "bi_lora"}, CHECKPOINTED, False),
    "flat_lora": ({"method": "flat_lora", "rho": 0.3}, {**ONE_BY_ONE, **REENTRANT}, True),
    "flat_lora, drawn": ({"method": "paper", "ascent": "flat_lora"}, CHECKPOINTED, False),
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(num_hidden_layers=3).save_pretrained(folder)
    return str(folder)


def trainer_of(folder, base_folder, settings, training, quantized, cls=SLSAMTrainer):
    config = None if cls is SFTTrainer else SLSAMConfig(**settings)
    return build(
        cls,
        folder,
        config,
        model=base(base_folder, quantized),
        peft_config=lora(target_modules=["q_proj", "down_proj"], lora_dropout=0.1),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        lr_scheduler_type="linear",
        **training,
    )


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def logs(trainer):
    """Return what later steps logged, without times, and without how the loss of what rode along has risen.

    That is of the step before, whose pass a new process has not seen.
    """
    left_out = ("runtime", "per_second", "flos", "train_loss", "num_tokens", "ascent_loss", "loss_rise", "ascent_gain")
    rows = [log for log in trainer.state.log_history if log["step"] > 2]
    return [{k: v for k, v in row.items() if not any(part in k for part in left_out)} for row in rows]


ALWAYS = ("bar", "bi_lora", "flat_lora, drawn")  # each keeps something else; the others in the slow run


@pytest.mark.parametrize("case", [c if c in ALWAYS else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_it_trains_resumes_bit_for_bit_and_is_recorded(case, base_folder, tmp_path):
    """On NF4 too. What is saved is the adapter alone, which computes what the trained model did."""
    settings, training, quantized = CASES[case]
    whole = trainer_of(tmp_path / "whole", base_folder, settings, training, quantized)
    whole.train()
    assert whole.slsam.steps == 4
    assert whole.slsam.skipped == 0
    parted = trainer_of(tmp_path / "parted", base_folder, settings, training, quantized)
    parted.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in weights(whole).items():
        assert torch.equal(weights(parted)[name], weight), name
    assert logs(parted) == logs(whole)
    state, other = whole.slsam.state_dict(), parted.slsam.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(v, other[k]) for k, v in state.items() if torch.is_tensor(v))

    plain = trainer_of(tmp_path / "plain", base_folder, {}, training, quantized, SFTTrainer)
    plain.train()
    differ = [not torch.equal(v, weights(whole)[n]) for n, v in weights(plain).items()]
    assert any(differ), "the rule has done nothing"

    folder = tmp_path / "saved"
    whole.save_model(str(folder))
    record = json.loads((folder / RECORD_NAME).read_text())["method"]
    assert {name: record[name] for name in settings} == settings
    whole.create_model_card()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert all(f"sl-sam:{name}={value}" in card for name, value in settings.items() if name != "method")
    inputs = {"input_ids": torch.arange(5, 17)[None]}
    again = PeftModel.from_pretrained(base(base_folder, quantized), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, whole.model.eval()(**inputs).logits)


def test_without_rho_each_is_plain_training(base_folder, tmp_path):
    plain = trainer_of(tmp_path / "plain", base_folder, {}, {}, False, SFTTrainer)
    plain.train()
    for name in ("bar", "bi_lora", "flat_lora"):
        ours = trainer_of(tmp_path / name, base_folder, {"method": name, "rho": 0.0}, {}, False)
        ours.train()
        assert all(torch.equal(v, weights(ours)[n]) for n, v in weights(plain).items()), name


def test_sampa_where_nothing_can_ride_along_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ascent='sampa' cannot be used here: it needs one micro-batch per step"):
        build(SLSAMTrainer, tmp_path, SLSAMConfig(method="auto", ascent="sampa"), gradient_accumulation_steps=2)


def test_the_rates_of_groups_are_each_pairs_own(base_folder, tmp_path):
    """As LoRA+ has them: B faster than A."""
    trainer = trainer_of(tmp_path, base_folder, {"method": "bar"}, {}, False)
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    ups = [p for n, p in named if "lora_B" in n]
    downs = [p for n, p in named if "lora_A" in n]
    trainer.optimizer = torch.optim.AdamW([{"params": downs, "lr": 0.01}, {"params": ups, "lr": 0.16}])
    trainer.train()
    trainer.state.global_step += 1  # asked anew
    last = {group["lr"] for group in trainer.optimizer.param_groups}
    assert {trainer.slsam.learning_rate(p) for p in downs} | {trainer.slsam.learning_rate(p) for p in ups} == last
    assert trainer.slsam.learning_rate(torch.nn.Parameter(torch.zeros(1))) == 0.0
