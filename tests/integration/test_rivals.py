"""Rules of other papers through SFTTrainer: accumulation, checkpointing, 4-bit bases, resume and what is saved."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback
from trl import SFTTrainer

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.algorithm.adversary import Adversary
from slsam_peft.algorithm.ascents import Ahead, Ascent
from slsam_peft.algorithm.noise import WeightNoise
from slsam_peft.algorithm.radius import Length
from slsam_peft.algorithm.sampa import Sampa
from slsam_peft.config import RECORD_NAME
from slsam_peft.models.bnb_cpu import keep_trainable
from slsam_peft.presets import ONE_PASS
from tests.resume_worker import base
from tests.tiny import build, llama, lora
from tests.tolerances import FLOAT32_NORMS

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

    method = "sam" if settings["method"] in ONE_PASS else settings["method"]
    without = trainer_of(
        tmp_path / "without", base_folder, {**settings, "method": method, "ascent": Ascent()}, training, quantized
    )
    without.train()
    assert without.slsam.steps == 4
    differ = [not torch.equal(v, weights(whole)[n]) for n, v in weights(without).items()]
    assert any(differ), "the rule has done nothing: without it the draws are the same"

    folder = tmp_path / "saved"
    whole.save_model(str(folder))
    record = json.loads((folder / RECORD_NAME).read_text())["method"]
    assert {name: record[name] for name in settings} == settings
    whole.create_model_card()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert all(f"sl-sam:{name}={value}" in card for name, value in settings.items() if name != "method")
    inputs = {"input_ids": torch.arange(5, 17)[None]}
    again = PeftModel.from_pretrained(base(base_folder, quantized), folder).eval()
    keep_trainable(again)  # else some processors repack weights for inference, which are too narrow for that here
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, whole.model.eval()(**inputs).logits)


KINDS = {
    "none": {"activation_checkpointing": False},
    "reentrant": REENTRANT,
    "not reentrant": {**CHECKPOINTED, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}
RULES = {
    **{name: {"method": "auto", "radius": name} for name in ("asam", "neuron", "weight")},
    **{name: {"method": "auto", "ascent": name} for name in ("zeroth_order", "sampa", "obar")},
    **{name: {"method": name} for name in ("bar", "bi_lora", "flat_lora")},
}


@pytest.mark.parametrize("rule", [r if r == "flat_lora" else pytest.param(r, marks=pytest.mark.slow) for r in RULES])
def test_both_kinds_of_checkpointing_train_alike(rule, base_folder, tmp_path):
    """And as none does; by plain gradients, whose rounding no optimizer makes larger."""
    ends = []
    for kind, training in KINDS.items():
        chosen = {"optim": "sgd", "learning_rate": 0.1, **training}
        trainer = trainer_of(tmp_path / kind, base_folder, RULES[rule], chosen, False)
        trainer.train()
        assert trainer.slsam.skipped == 0
        ends.append(weights(trainer))
    for end in ends[1:]:
        for name, weight in ends[0].items():
            torch.testing.assert_close(end[name], weight, rtol=FLOAT32_NORMS, atol=FLOAT32_NORMS)


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


class Rates(TrainerCallback):
    """Notes, before each step of the optimizer, what rate each parameter is said to have and what its group has."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.said, self.has = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        groups = self.trainer.optimizer.param_groups
        self.said.append([[self.trainer.slsam.learning_rate(p) for p in group["params"]] for group in groups])
        self.has.append([[group["lr"]] * len(group["params"]) for group in groups])


def test_the_rates_of_groups_are_each_pairs_own(base_folder, tmp_path):
    """As LoRA+ has them: B faster than A, and both falling."""
    trainer = trainer_of(tmp_path, base_folder, {"method": "bar"}, {}, False)
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    downs, ups = ([p for n, p in named if part in n] for part in ("lora_A", "lora_B"))
    trainer.optimizer = torch.optim.AdamW([{"params": downs, "lr": 0.01}, {"params": ups, "lr": 0.16}])
    rates = Rates(trainer)
    trainer.add_callback(rates)
    trainer.train()
    assert rates.said == rates.has
    assert len(rates.has) == 4
    assert [up[0] / down[0] for down, up in rates.has] == pytest.approx([16.0] * 4)
    assert len({down[0] for down, _ in rates.has}) == 4
    assert trainer.slsam.learning_rate(torch.nn.Parameter(torch.zeros(1))) == 0.0


@pytest.mark.parametrize("ascent", [Sampa(1), Ahead(1)], ids=["sampa", "ahead"])
def test_an_object_whose_sequences_cannot_ride_is_told_of(ascent, tmp_path):
    """By name it is refused."""
    config = SLSAMConfig(method="auto", ascent=ascent)
    trainer = build(SLSAMTrainer, tmp_path, config, gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    (told,) = trainer.slsam_fallbacks
    assert told.what == "no sequence rides along in the pass of another batch"
    assert "one micro-batch per step" in told.why


STRENGTHS = {
    "bi_lora": (Adversary(0.2), Adversary(0.2, adam=False)),
    "flat_lora": (WeightNoise(0.2), WeightNoise(0.1)),
    "sampa": (Sampa(1, share=0.5), Sampa(1)),
    "radius": (Length(0.1), Length(0.2)),
}


@pytest.mark.parametrize("rule", [r if r == "bi_lora" else pytest.param(r, marks=pytest.mark.slow) for r in STRENGTHS])
def test_a_rule_that_is_an_object_goes_on_with_its_own_strength_alone(rule, base_folder, tmp_path):
    """What it was made with is in the record, and a checkpoint of another strength is refused."""
    field = "radius" if rule == "radius" else "ascent"
    made, other = ({"method": "auto", field: given} for given in STRENGTHS[rule])
    whole = trainer_of(tmp_path / "whole", base_folder, made, {}, False)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert json.loads((checkpoint / RECORD_NAME).read_text())["method"][field] == whole.slsam_config.to_dict()[field]
    with pytest.raises(ValueError, match=rf"made with other settings: {field}="):
        trainer_of(tmp_path / "other", base_folder, other, {}, False).train(resume_from_checkpoint=str(checkpoint))
    again = trainer_of(tmp_path / "again", base_folder, made, {}, False)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(v, weights(again)[n]) for n, v in weights(whole).items())
