"""The radius is that of the ascent sequences' own mean loss, whatever a trainer's loss is divided by."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from slsam_peft import SLSAMConfig, SLSAMMixin, SLSAMTrainer
from slsam_peft.algorithm.passes import PassRunner
from slsam_peft.trainer.divisor import Divisor
from tests import tiny
from tests.tolerances import FLOAT32_NORMS

CONFIG = SLSAMConfig(method="auto", ascent="partial", loss_rise=0.01, rho_max=1000, active_fraction=1.0, trace=False)
SENTENCE = Dataset.from_list([{"text": "w1 w2 w3 w4 w5 w6"}] * 16)
SILENT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class MixedTrainer(SLSAMMixin, Trainer):
    """transformers' trainer with the method."""


class OverriddenTrainer(SLSAMTrainer):
    """Takes a mean over tokens, whatever number of items it is handed."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return mean_loss(outputs, inputs["labels"])


def cross_entropy(outputs, labels, **settings):
    predicted = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=-100, **settings)


def mean_loss(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs, labels)


def summed_loss(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs, labels, reduction="sum") / num_items_in_batch


def with_factors(model):
    """Give the factors that begin at 0 values, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes, **SILENT))
    return get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))


def bart():
    torch.manual_seed(0)
    sizes = {f"{part}_{of}": 2 for part in ("encoder", "decoder") for of in ("layers", "attention_heads")}
    silent = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = BartConfig(vocab_size=50, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes, **silent)
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_2_SEQ_LM"}
    return get_peft_model(BartForConditionalGeneration(config), LoraConfig(r=4, **settings))


def mixed(make, labels):
    def rho(folder, count):
        row = {"input_ids": [3, 4, 5, 6], "attention_mask": [1] * 4, "labels": labels}
        args = TrainingArguments(
            str(folder), per_device_train_batch_size=count, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
        )
        trainer = MixedTrainer(with_factors(make()), args, train_dataset=[row] * 8, slsam_config=CONFIG)
        trainer.train()
        return trainer.slsam.metrics["rho"]

    return rho


def sft(cls=SLSAMTrainer, **parts):
    def rho(folder, count):
        trainer = tiny.train(
            cls, folder, CONFIG, data=SENTENCE, per_device_train_batch_size=count, max_steps=1, parts=parts
        )
        return trainer.slsam.metrics["rho"]

    return rho


@pytest.mark.filterwarnings("ignore:.compute_loss_func. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "rho_of",
    [
        pytest.param(sft(), id="TRL's own loss"),
        pytest.param(sft(compute_loss_func=summed_loss), id="a function that divides by the items"),
        pytest.param(sft(compute_loss_func=mean_loss), id="a function that takes a mean"),
        pytest.param(sft(OverriddenTrainer), id="an overridden loss that takes a mean"),
        pytest.param(mixed(bert, 1), id="a classifier"),
        pytest.param(mixed(bart, [7, 1]), id="an encoder-decoder"),
    ],
)
def test_the_radius_does_not_depend_on_how_often_a_step_has_the_same_row(rho_of, tmp_path):
    """All these losses are handed the number of items of the step, and some of them do not look at it."""
    one, two, four = (rho_of(tmp_path, count) for count in (1, 2, 4))
    assert one > 0
    assert (two, four) == pytest.approx((one, one), rel=FLOAT32_NORMS)


@pytest.mark.filterwarnings("ignore:.compute_loss_func. is deprecated:FutureWarning")
def test_finding_out_what_a_loss_is_divided_by_leaves_the_random_state_alone(tmp_path, monkeypatch):
    def train():
        trainer = tiny.train(
            SLSAMTrainer,
            tmp_path,
            CONFIG,
            peft_config=tiny.lora(lora_dropout=0.5),
            per_device_train_batch_size=2,
            max_steps=2,
            parts={"compute_loss_func": summed_loss},
        )
        return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]

    found_out = train()
    monkeypatch.setattr(Divisor, "find_out", lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(found_out, train(), strict=True))


def test_nothing_rides_in_a_loss_that_is_no_sum_over_tokens(tmp_path):
    """An overridden loss is found out by its value; one that only looks at TRL's own lets sequences ride."""

    class Looking(SLSAMTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    def reasons(cls):
        trainer = tiny.train(cls, tmp_path, SLSAMConfig(trace=False), per_device_train_batch_size=3, max_steps=3)
        return [f.why for f in trainer.slsam_fallbacks if f.what.startswith("no sequence rides")]

    assert reasons(Looking) == []
    assert len(reasons(OverriddenTrainer)) == 1


@pytest.mark.parametrize("batches", [1, 2])
def test_a_routers_loss_weighs_in_a_cut_what_it_weighs_in_its_sequence_alone(batches, tmp_path, monkeypatch):
    def mixtral():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
        return MixtralForCausalLM(
            MixtralConfig(vocab_size=205, router_aux_loss_coef=0.5, pad_token_id=1, **sizes, **experts)
        )

    def perturbation(count, accumulated):
        # Rows of unequal lengths, of which the first one makes the ascent.
        rows = [" ".join(f"w{(7 * row + i) % 200}" for i in range(6 + 3 * row)) for row in range(8)]
        trainer = tiny.build(
            SLSAMTrainer,
            tmp_path,
            CONFIG,
            model=mixtral(),
            data=Dataset.from_list([{"text": row} for row in rows]),
            peft_config=tiny.lora(target_modules=["q_proj", "v_proj"]),
            per_device_train_batch_size=count,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            learning_rate=0.0,
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
        )
        with_factors(trainer.model)
        made = []

        def keep(runner, members, offsets):
            made.append(torch.cat([e.flatten() for e in offsets]))
            return make(runner, members, offsets)

        with monkeypatch.context() as patched:
            make = PassRunner.perturbation
            patched.setattr(PassRunner, "perturbation", keep)
            trainer.train()
        return made[0]

    alone, cut = perturbation(1, 1), perturbation(4, batches)
    assert float((cut - alone).norm()) <= FLOAT32_NORMS * float(alone.norm())
