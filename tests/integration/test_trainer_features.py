"""What people train with, each for three steps: the right arms move, everything else stays as it was."""

import functools
import math

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from slsam_peft import SLSAMConfig, SLSAMTrainer
from tests.tiny import build, completions, conversations, llama, lora, texts, train
from tests.watch import STEPS, Watch, check, hooks

CONFIG = SLSAMConfig(rho=0.05, active_fraction=0.4)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # the rest of a sweep whose first cases always run


def run(folder, config=CONFIG, **settings):
    """Train three steps under watch, check them and return the trainer and the watch."""
    trainer = build(SLSAMTrainer, folder, config, **settings)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    check(trainer, watch)
    return trainer, watch


ARGUMENTS = {
    "no checkpointing": {"activation_checkpointing": False},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "packing": {"packing": True, "max_length": 32},
    "wrapped packing": {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
    "bf16 autocast": {"bf16": True},
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "adamw_torch": {"optim": "adamw_torch", "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor"},
    "tight clipping": {"max_grad_norm": 1e-3},
    "no clipping": {"max_grad_norm": 0.0},
    "accumulation": {"gradient_accumulation_steps": 2},
    "dft loss": {"loss_type": "dft"},
    "group by length": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize("settings", ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_arguments(settings, tmp_path):
    run(tmp_path, **settings)


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:FutureWarning")
def test_label_smoothing(tmp_path):
    run(tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    "scheduler",
    [
        "cosine",
        "constant_with_warmup",
        *map(slow, ["linear", "cosine_with_restarts", "polynomial", "inverse_sqrt"]),
    ],
)
def test_learning_rate_schedulers(scheduler, tmp_path):
    trainer, _ = run(tmp_path, lr_scheduler_type=scheduler)
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert len(rates) == STEPS
    assert trainer.lr_scheduler.last_epoch == STEPS


ADAPTERS = {
    "dropout": {"lora_dropout": 0.3},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "modules_to_save: head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "modules_to_save: embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "LoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "trainable tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": list(range(5, 60))},
    },
    "trained biases": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "some blocks": {"layers_to_transform": [0, 1, 2, 4], "target_modules": ["q_proj"]},
}


# Every kind with one sampling scheme always, and with the other one in the slow run.
PAIRS = [
    (slow if (i + j) % 2 else pytest.param)(settings, design, id=f"{name}-{design}")
    for i, (name, settings) in enumerate(ADAPTERS.items())
    for j, design in enumerate(("bernoulli", "depth"))
]


@pytest.mark.parametrize(("settings", "design"), PAIRS)
def test_adapters(settings, design, tmp_path):
    model = llama(attention_bias=True) if "bias" in settings else llama()
    config = SLSAMConfig(rho=0.05, active_fraction=0.5, design=design)
    run(tmp_path, config, model=model, peft_config=lora(**settings))


@pytest.mark.parametrize("granularity", ["block", "module", "tensor"])
def test_granularities(granularity, tmp_path):
    """Two factors are two arms at 'tensor', and a zero B gives A no gradient; so both start away from zero."""
    config = SLSAMConfig(rho=0.05, active_fraction=0.4, granularity=granularity)
    run(tmp_path, config, peft_config=lora(init_lora_weights=False))


def test_padding_free(tmp_path):
    """One row without attention mask; positions mark where sequences start. Attention on a CPU then crosses them,
    which changes what is learnt and nothing about how.
    """
    trainer, _ = run(tmp_path, padding_free=True, max_length=None)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1
    assert "position_ids" in batch


def test_assistant_only_loss(tmp_path):
    trainer, _ = run(tmp_path, data=conversations(), assistant_only_loss=True)
    _check_masked_labels(trainer)


@pytest.mark.parametrize("completion_only", [True, False])
def test_completion_only_loss(completion_only, tmp_path):
    trainer, _ = run(tmp_path, data=completions(), completion_only_loss=completion_only)
    _check_masked_labels(trainer, masked=completion_only)


def _check_masked_labels(trainer, masked=True):
    batch = next(iter(trainer.get_train_dataloader()))
    real = batch["attention_mask"].bool()
    assert (batch["labels"][real] == -100).any().item() is masked
    assert (batch["labels"][real] != -100).any()


@pytest.fixture
def saved_base(tmp_path):
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    return folder


QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4, double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "8-bit": {"load_in_8bit": True},
}


@pytest.mark.parametrize(
    ("name", "adapter_dtype"),
    [
        ("nf4", "float32"),
        ("nf4, double", "keep"),
        ("8-bit", "float32"),
        slow("nf4", "keep"),
        slow("nf4, double", "float32"),
        slow("8-bit", "keep"),
    ],
)
def test_quantized_base_weights(name, adapter_dtype, saved_base, tmp_path):
    quantization = BitsAndBytesConfig(**QUANTIZED[name])
    model = LlamaForCausalLM.from_pretrained(
        saved_base, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    config = SLSAMConfig(rho=0.2, active_fraction=0.4, adapter_dtype=adapter_dtype)
    trainer, watch = run(tmp_path / "out", config, model=model, learning_rate=0.05)
    expected = torch.float32 if adapter_dtype == "float32" else torch.bfloat16
    assert {weight.dtype for weight in watch.after.values()} == {expected}
    quantized = [n for n, weight in watch.frozen.items() if weight.dtype in (torch.uint8, torch.int8)]
    assert len(quantized) == 7 * len(trainer.slsam.arms)


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", slow("adamw_8bit"), slow("adamw_bnb_8bit")])
def test_8_bit_optimizers(optimizer, tmp_path):
    """The head is large enough: below 4,096 elements, and for embeddings, bitsandbytes keeps float32 moments."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    trainer, _ = run(
        tmp_path, SLSAMConfig(rho=0.05, active_fraction=0.5), peft_config=lora(**settings), optim=optimizer
    )
    moments = {state["state1"].dtype for state in trainer.optimizer.state.values()}
    assert torch.uint8 in moments


def test_evaluation_in_the_middle(tmp_path):
    trainer, _ = run(tmp_path, parts={"eval_dataset": texts(6, seed=5)}, eval_strategy="steps", eval_steps=1)
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) == STEPS
    assert all(math.isfinite(x) for x in losses)


def test_evaluation_changes_nothing(tmp_path):
    """With and without evaluations between its steps a training ends at the same weights."""
    evaluated, _ = run(tmp_path / "a", parts={"eval_dataset": texts(6, seed=5)}, eval_strategy="steps", eval_steps=1)
    plain, _ = run(tmp_path / "b")
    for p, q in zip(evaluated.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(evaluated.slsam.probabilities, plain.slsam.probabilities)


def test_save_steps(tmp_path):
    run(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]
    assert all((tmp_path / name / "slsam.safetensors").is_file() for name in kept)


def test_load_best_model_at_end(tmp_path):
    """A learning rate that does damage: the best checkpoint is not the last; its weights and sampler come back."""
    from safetensors.torch import load_file

    trainer = train(
        SLSAMTrainer,
        tmp_path,
        CONFIG,
        parts={"eval_dataset": texts(6, seed=5)},
        learning_rate=1.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    best = 1 + losses.index(min(losses))
    assert best < STEPS == trainer.state.global_step
    assert trainer.slsam.steps == best
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    saved = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    here = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert here.keys() == saved.keys()
    assert all(torch.equal(here[n], saved[n]) for n in saved)
    last = load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert any(not torch.equal(last[n], saved[n]) for n in saved)


def test_an_error_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    """The model raises in the second pass of the second step; weights, hooks and sampler are those of before it."""
    trainer = build(SLSAMTrainer, tmp_path, CONFIG, activation_checkpointing=False)
    watch = Watch()
    trainer.add_callback(watch)
    seen = {}

    def broken(*args):
        raise RuntimeError("no luck")

    descend = type(trainer.slsam.runner).descend

    def failing(runner, step, pending, *, logged):
        if trainer.slsam.steps < 1:
            return descend(runner, step, pending, logged=logged)
        seen["probabilities"] = trainer.slsam.probabilities.clone()

        handle = trainer.model.base_model.model.model.layers[-1].register_forward_pre_hook(broken)
        try:
            return descend(runner, step, pending, logged=logged)
        finally:
            handle.remove()

    monkeypatch.setattr(type(trainer.slsam.runner), "descend", failing)
    with pytest.raises(RuntimeError, match="no luck"):
        trainer.train()
    assert hooks(trainer.model) == watch.hooks
    assert {n: p.requires_grad for n, p in trainer.model.named_parameters()} == watch.trainable
    for name, parameter in trainer.model.named_parameters():
        if name in watch.before:
            assert torch.equal(parameter, watch.before[name]), name
            assert parameter.grad is None
    assert torch.equal(trainer.slsam.probabilities, seen["probabilities"])
    assert trainer.slsam.steps == 1
