"""Set-ups that cannot work are refused before the first step, with the value and what to do."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from slsam_peft import SLSAMConfig, SLSAMMixin, SLSAMTrainer
from slsam_peft.trainer.sharded import check_resumed, check_sharding
from slsam_peft.trainer.support import check_optimizer, check_trainer, held, may_be_trained
from tests.tiny import build, llama, lora, sft_args, texts, tokenizer, train


class SLSAMPlainTrainer(SLSAMMixin, Trainer):
    """SL-SAM in transformers' own trainer."""


class SLSAMGRPOTrainer(SLSAMMixin, GRPOTrainer):
    """Refused."""


class Weights:
    """Checks that a failing call trained nothing."""

    def __init__(self, model):
        self.model, self.before = model, {n: p.detach().clone() for n, p in model.named_parameters()}

    def check(self):
        assert all(torch.equal(p, self.before[n]) for n, p in self.model.named_parameters())


def test_no_trainable_parameter(tmp_path):
    model = llama().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter; pass a peft_config, .*is_trainable=True"):
        build(SLSAMTrainer, tmp_path, SLSAMConfig(), model=model, peft_config=None)


def test_wrong_type_of_config(tmp_path):
    with pytest.raises(TypeError, match=r"slsam_config=\{'rho': 0\.1\} must be an SLSAMConfig"):
        build(SLSAMTrainer, tmp_path, {"rho": 0.1})


def test_optimizer_that_lacks_arms(tmp_path):
    """An optimizer over half of the adapters."""
    from peft import get_peft_model

    model = get_peft_model(llama(), lora())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained[: len(trained) // 2])
    parts = {"optimizers": (optimizer, None)}
    trainer = build(SLSAMTrainer, tmp_path, SLSAMConfig(), model=model, peft_config=None, parts=parts)
    weights = Weights(model)
    with pytest.raises(
        ValueError, match=rf"lacks {len(trained) - len(trained) // 2} trainable .*layers\.\d.*optimizers"
    ):
        trainer.train()
    weights.check()


def test_optimizer_that_holds_all_arms_is_used(tmp_path):
    from peft import get_peft_model

    model = get_peft_model(llama(), lora())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    parts = {"optimizers": (optimizer, None)}
    trainer = train(SLSAMTrainer, tmp_path, SLSAMConfig(), model=model, peft_config=None, parts=parts)
    assert trainer.slsam.steps == 3


def test_torch_compile_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"torch\.compile is not supported.*Set torch_compile=False"):
        build(SLSAMTrainer, tmp_path, SLSAMConfig(), torch_compile=True)


def test_a_checkpoint_in_the_middle_of_a_step(tmp_path):
    with pytest.raises(ValueError, match=r"enable_jit_checkpoint=True is not supported: .* Use save_steps"):
        build(SLSAMTrainer, tmp_path, SLSAMConfig(), enable_jit_checkpoint=True)


@pytest.mark.parametrize("adapted", ["by the trainer", "before", "inside"])
def test_compiled_language_model(adapted, tmp_path):
    """Whether the adapter goes around the compiled model or was compiled with it."""
    from peft import get_peft_model

    settings = lora(target_modules=["q_proj"])
    if adapted == "inside":
        model, settings = torch.compile(get_peft_model(llama(), settings), backend="eager"), None
    else:
        model = torch.compile(llama(), backend="eager")
    if adapted == "before":
        model, settings = get_peft_model(model, settings), None
    with pytest.raises(ValueError, match=r"torch\.compile is not supported.*pass the model as it was before"):
        build(SLSAMTrainer, tmp_path, SLSAMConfig(), model=model, peft_config=settings)


@pytest.mark.parametrize("how", ["model.compile", "block.compile", "torch.compile(block)"])
def test_model_compiled_in_place_or_in_part(how, tmp_path):
    model = llama()
    layers = model.model.layers
    if how == "torch.compile(block)":
        layers[1] = torch.compile(layers[1], backend="eager")
    else:
        (model if how == "model.compile" else layers[1]).compile(backend="eager")
    with pytest.raises(ValueError, match=r"torch\.compile is not supported.*pass the model as it was before"):
        build(SLSAMTrainer, tmp_path, SLSAMConfig(), model=model)


def test_compiled_model(tmp_path):
    compiled = torch.compile(llama(), backend="eager")
    with pytest.raises(ValueError, match=r"torch\.compile is not supported.*pass the model as it was before"):
        SLSAMPlainTrainer(
            compiled,
            args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
            train_dataset=texts(),
            slsam_config=SLSAMConfig(),
        )


def _fake(**changes):
    args = SimpleNamespace(torch_compile=False, n_gpu=0, enable_jit_checkpoint=False)
    values = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, "args": args, "model": nn.Linear(2, 2)}
    return SimpleNamespace(**{**values, **changes})


def test_a_plain_set_up_passes():
    check_trainer(_fake())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("is_deepspeed_enabled", r"DeepSpeed is not supported: .*0\.19\.8 with ZeRO-2 on one CPU .* tried.*Use DDP"),
        ("is_fsdp_enabled", r"FSDP is not supported but for FSDP2 .*Use DDP"),
    ],
)
def test_engines_that_own_the_gradients(flag, message):
    """Neither can be started on a CPU without its launcher, so the trainer is stood in for."""
    trainer = _fake(**{flag: True}, accelerator=SimpleNamespace(is_fsdp2=False))
    check = check_trainer if flag == "is_deepspeed_enabled" else lambda t: check_sharding(t, SLSAMConfig().resolved)
    with pytest.raises(ValueError, match=message):
        check(trainer)


class Params4bit(nn.Parameter):
    """Has the name of a weight that bitsandbytes has packed."""


def _quantised():
    model = nn.Linear(2, 2)
    model.weight = Params4bit(torch.zeros(2, 2))
    return model


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"cpu_offload": CPUOffloadPolicy()}, {}, "fsdp_offload_params"),
        ({"activation_checkpointing": True}, {}, "fsdp_activation_checkpointing"),
        ({"fp16": True}, {}, "fp16=True"),
        ({"model": _quantised()}, {}, "a base that bitsandbytes has quantised"),
        ({}, {"cost_budget": 1.0, "design": "depth"}, "cost_budget=1.0"),
        ({}, {"ascent": "remembered", "descent": "active"}, "ascent='remembered'"),
        ({}, {"method": "auto", "ascent": "ahead"}, "ascent='ahead'"),
    ],
)
def test_what_is_not_shown_to_be_exact_under_fsdp2_is_refused_by_name(changes, settings, message):
    """FSDP2 is started by accelerate on accelerators alone, so the trainer is stood in for."""
    asked = {
        "cpu_offload": OffloadPolicy(),
        "activation_checkpointing": False,
        "fp16": False,
        "model": nn.Linear(2, 2),
    }
    asked |= changes
    plugin = SimpleNamespace(
        cpu_offload=asked["cpu_offload"], activation_checkpointing=asked["activation_checkpointing"]
    )
    trainer = _fake(
        is_fsdp_enabled=True,
        accelerator=SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin)),
        args=SimpleNamespace(fp16=asked["fp16"]),
        model=asked["model"],
    )
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*is not supported under FSDP2.*Use DDP"):
        check_sharding(trainer, SLSAMConfig(**settings).resolved)


def test_one_process_for_several_gpus():
    """`DataParallel` copies the model in every pass; two GPUs are stood in for."""
    with pytest.raises(ValueError, match=r"one process for 2 GPUs is not supported.*torchrun.*CUDA_VISIBLE_DEVICES=0"):
        check_trainer(_fake(args=SimpleNamespace(torch_compile=False, n_gpu=2)))


def test_grpo(tmp_path):
    args = sft_args(
        tmp_path,
        config_class=GRPOConfig,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
    )
    with pytest.raises(
        ValueError, match=r"SLSAMGRPOTrainer is not supported: .*SFT, DPO, KTO and reward trainers work"
    ):
        SLSAMGRPOTrainer(
            llama(),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "w1 w2"}] * 8),
            processing_class=tokenizer(),
            peft_config=lora(),
            slsam_config=SLSAMConfig(),
        )


def test_what_grpo_is_told_by_is_there_in_every_generating_trainer():
    """The refusal goes by this method; TRL's RLOO trainer has it as well."""
    assert hasattr(GRPOTrainer, "_generate_and_score_completions")
    assert hasattr(RLOOTrainer, "_generate_and_score_completions")


@pytest.mark.parametrize("ascent", ["partial", "auto"])
def test_a_lone_sequence_makes_its_own_ascent(ascent, tmp_path, caplog):
    """At the cost of a second pass, which is said once where every step has it; a last batch of one is none."""
    config = SLSAMConfig(method="auto", ascent=ascent)
    trainer = train(SLSAMTrainer, tmp_path, config, per_device_train_batch_size=1)
    assert trainer.slsam.steps == 3
    told = [r.message for r in caplog.records if "the ascent is made by the whole batch" in r.message]
    assert len(told) == (ascent == "partial")
    assert all("gradient accumulation" in message for message in told)


@pytest.mark.parametrize(
    "settings",
    [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}],
    ids=["packed", "padding-free"],
)
def test_documents_are_sequences(settings, tmp_path):
    config = SLSAMConfig(method="auto", ascent="partial")
    trainer = train(SLSAMTrainer, tmp_path, config, **settings)
    assert all(log["slsam/rho"] > 0 for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_more_ascent_sequences_than_a_step_has(accumulation, tmp_path):
    config = SLSAMConfig(ascent_sequences=2 * accumulation + 1)
    with pytest.raises(
        ValueError,
        match=rf"ascent_sequences={2 * accumulation + 1} is more than the {2 * accumulation} sequences.*method='sam'",
    ):
        build(SLSAMTrainer, tmp_path, config, gradient_accumulation_steps=accumulation)
    fits = SLSAMConfig(ascent_sequences=2 * accumulation)
    build(SLSAMTrainer, tmp_path, fits, gradient_accumulation_steps=accumulation)


def test_an_optimizer_that_steps_inside_the_backward_pass(tmp_path):
    """A second pass would start from other weights."""
    trainer = build(SLSAMTrainer, tmp_path)
    trainer.create_optimizer()
    first = trainer.slsam_arms[0].parameters[0]
    first.register_post_accumulate_grad_hook(lambda p: p.detach().sub_(p.grad))
    weights = Weights(trainer.model)
    with pytest.raises(
        ValueError, match=rf"hooks {trainer.slsam_arms[0].parameter_names[0]}.*inside the backward pass"
    ):
        trainer.train()
    weights.check()


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_are_named_for_it(optim):
    parameter = nn.Parameter(torch.ones(2))
    arm = SimpleNamespace(parameter_names=("w",), parameters=(parameter,))
    trainer = SimpleNamespace(
        optimizer=torch.optim.SGD([parameter], lr=0.1), args=SimpleNamespace(optim=SimpleNamespace(value=optim))
    )
    with pytest.raises(ValueError, match=rf"optim='{optim}', is not supported.*paged_adamw_8bit"):
        check_optimizer(trainer, [arm])


def test_partial_ascent_of_one_sequence_with_accumulation(tmp_path):
    config = SLSAMConfig(ascent="partial", ascent_fraction=0.5)
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert train(SLSAMTrainer, tmp_path, config, **settings).slsam.steps == 3


@pytest.mark.parametrize("budget", [0.01, 50.0])
def test_cost_budget_out_of_reach(budget, tmp_path):
    trainer = build(SLSAMTrainer, tmp_path, SLSAMConfig(cost_budget=budget, design="depth"))
    weights = Weights(trainer.model)
    with pytest.raises(ValueError, match=rf"cost_budget={budget:g} is out of reach: .* between .* and .*; (set|use) "):
        trainer.train()
    weights.check()


def test_cost_budget_with_trained_embeddings(tmp_path):
    trainer = build(
        SLSAMTrainer,
        tmp_path,
        SLSAMConfig(cost_budget=1.0, design="depth"),
        peft_config=lora(target_modules=["q_proj", "embed_tokens"]),
    )
    with pytest.raises(
        ValueError, match=r"cost_budget=1\.0 needs a block to cut at.*embed_tokens.* lies below the blocks"
    ):
        trainer.train()


def test_cost_budget_without_adapters(tmp_path):
    """The unit is a plain LoRA step; training itself works, and logs no cost."""
    config = SLSAMConfig(cost_budget=1.0, design="depth")
    trainer = build(SLSAMTrainer, tmp_path / "a", config, peft_config=None)
    with pytest.raises(ValueError, match="needs a cost model, and it counts adapters on frozen weights"):
        trainer.train()
    trainer = train(SLSAMTrainer, tmp_path / "b", SLSAMConfig(active_fraction=0.4), peft_config=None)
    assert trainer.slsam.steps == 3
    assert not any("slsam/cost" in log for log in trainer.state.log_history)


def test_active_fraction_of_less_than_one_arm(tmp_path):
    trainer = build(SLSAMTrainer, tmp_path, SLSAMConfig(active_fraction=0.1))
    with pytest.raises(ValueError, match=r"active_fraction=0\.1 of 5 arms is less than one arm; use at least 0\.2"):
        trainer.train()


class Flat(PreTrainedModel):
    """A classifier without a stack of blocks."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.post_init()

    def forward(self, x, labels=None):
        return {"loss": nn.functional.cross_entropy(self.head(self.body(x).tanh()), labels)}


def _flat_trainer(folder, config):
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(4, generator=generator), "labels": i % 2} for i in range(12)]
    settings = {"use_cpu": True, "report_to": [], "max_steps": 3, "save_strategy": "no", "disable_tqdm": True}
    torch.manual_seed(0)
    return SLSAMPlainTrainer(
        Flat(PreTrainedConfig()),
        args=TrainingArguments(str(folder), **settings),
        train_dataset=rows,
        slsam_config=config,
    )


def test_model_without_blocks_at_granularity_block_has_an_arm_per_module(tmp_path, caplog):
    trainer = _flat_trainer(tmp_path, SLSAMConfig(active_fraction=0.5))
    trainer.train()
    assert [arm.name for arm in trainer.slsam.arms] == ["body", "head"]
    assert sum("Flat trains nothing in a stack of transformer blocks" in r.message for r in caplog.records) == 1


def test_model_without_blocks_at_granularity_module_trains(tmp_path):
    trainer = _flat_trainer(tmp_path, SLSAMConfig(granularity="module", active_fraction=0.5))
    trainer.train()
    assert trainer.slsam.steps == 3


@pytest.mark.parametrize("design", ["depth", "window"])
def test_schemes_by_depth_without_blocks(design, tmp_path):
    config = SLSAMConfig(granularity="module", active_fraction=0.5, design=design)
    trainer = _flat_trainer(tmp_path, config)
    weights = Weights(trainer.model)
    with pytest.raises(ValueError, match=rf"design='{design}'.*(depth|blocks)"):
        trainer.train()
    weights.check()


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"method": "paper"}, "SHARDED_STATE_DICT", r"under FSDP2 with descent='active': .*Set descent='all'"),
        ({}, "FULL_STATE_DICT", r"with .*FULL_STATE_DICT: set state_dict_type to SHARDED_STATE_DICT"),
        ({}, "SHARDED_STATE_DICT", None),
        ({"rho": 0.0}, "SHARDED_STATE_DICT", None),
    ],
)
def test_resuming_under_fsdp2_is_refused_where_it_was_not_seen_to_be_exact(settings, kind, message):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(state_dict_type=f"StateDictType.{kind}"))
    trainer = SimpleNamespace(is_fsdp_enabled=True, accelerator=SimpleNamespace(is_fsdp2=True, state=state))
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_resumed(trainer, SLSAMConfig(**settings).resolved)


def test_what_a_callback_has_frozen_is_known_by_name_when_sharding_has_replaced_it():
    """FSDP2 puts new parameters in the place of those that were there when the trainer was built."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].requires_grad_(False)
    assert may_be_trained(model) == {"0.weight", "1.weight"}, "without adapters each counts"
    candidates = {"0.weight"}
    for layer in model:
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters())
    with held(optimizer, model, candidates):
        assert [layer.weight.requires_grad for layer in model] == [True, False]
    assert not any(layer.weight.requires_grad for layer in model)
