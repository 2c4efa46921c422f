"""Predicted FLOPs against FLOPs counted on whole `trainer.train()` runs, on the CPU."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode, mm_flop
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.algorithm.ascents import Part
from slsam_peft.cost.block import NONE, Size
from slsam_peft.cost.expected import active_names, rule_of
from slsam_peft.cost.model import CostModel
from tests.tolerances import COUNTED_FLOPS

WORDS, LENGTH = 500, 64


def _sizes(**more):
    return {
        "vocab_size": WORDS,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **more,
    }


CONFIGS = {
    "llama": LlamaConfig(**_sizes()),
    "qwen2": Qwen2Config(**_sizes()),
    "gemma2": Gemma2Config(**_sizes(head_dim=32, sliding_window=16)),
    "gemma3": Gemma3TextConfig(**_sizes(head_dim=32, sliding_window=16)),
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=96, n_layer=4, n_head=4, n_positions=128),
    "opt": OPTConfig(
        vocab_size=WORDS, hidden_size=96, word_embed_proj_dim=96, ffn_dim=256, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=128,
    ),
}  # fmt: skip


def _inplace_addmm(self_shape, a_shape, b_shape, *args, out_shape=None, **kwargs):
    return mm_flop(a_shape, b_shape)


def counter():
    # The fused head adds up its hidden states' gradient with `addmm_`, for which torch has no formula.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _inplace_addmm})


def tokenizer():
    words = {f"w{i}": i for i in range(WORDS - 2)} | {"<pad>": WORDS - 2, "<eos>": WORDS - 1}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def build(tmp_path):
    """Return a function that builds a trainer on random tokens."""

    def make(config, cls=SFTTrainer, batch=4, micro_batches=1, steps=2, checkpointing=True, **kwargs):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        ids = torch.randint(0, WORDS - 2, (batch * micro_batches * steps, LENGTH)).tolist()
        args = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=micro_batches,
            activation_checkpointing=checkpointing,
            max_length=LENGTH,
            dataset_kwargs={"skip_prepare_dataset": True},
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        return cls(
            model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            processing_class=tokenizer(),
            peft_config=LoraConfig(
                r=4, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=isinstance(config, GPT2Config)
            ),
            **kwargs,
        )

    return make


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "no_checkpointing"])
@pytest.mark.parametrize("family", CONFIGS)
def test_plain_steps(build, family, checkpointing):
    trainer = build(CONFIGS[family], steps=1, checkpointing=checkpointing)
    predicted = CostModel.from_model(trainer.model, checkpointing).plain([(4, LENGTH)])
    with counter() as count:
        trainer.train()
    assert predicted == pytest.approx(count.get_total_flops(), rel=COUNTED_FLOPS)


def test_thin_llama_within_one_percent_of_the_bare_counter(build):
    """32 blocks; the counter as torch ships it misses the head's `addmm_`, 0.4 % here."""
    trainer = build(LlamaConfig(**_sizes(num_hidden_layers=32)), steps=1)
    predicted = CostModel.from_model(trainer.model, True).plain([(4, LENGTH)])
    with FlopCounterMode(display=False) as count:
        trainer.train()
    assert predicted == pytest.approx(count.get_total_flops(), rel=0.01)


class _Masks(TrainerCallback):
    """Keeps the active set of every step."""

    def __init__(self):
        self.seen = []
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.trainer.slsam.active.clone())


MODES = {
    "paper": {"bandit": "paper", "active_fraction": 0.25},
    "depth": {"design": "depth", "active_fraction": 0.5},
    "window": {"design": "window", "active_fraction": 0.5},
    "partial": {"design": "depth", "active_fraction": 0.5, "ascent": "partial"},
    "remembered": {"design": "depth", "active_fraction": 0.5, "ascent": "remembered"},
    "auto": {},
    "auto_two_sequences": {"ascent_sequences": 2},
    "small_pass": {"method": "auto", "ascent": "partial"},
    "small_pass_modules": {"method": "auto", "ascent": "partial", "granularity": "module"},
    "sam": {"method": "sam"},
    "dense_descent": {"design": "depth", "active_fraction": 0.5, "descent": "all"},
    "dense_descent_bernoulli": {"active_fraction": 0.25, "descent": "all"},
    "without_ascent": {"design": "depth", "active_fraction": 0.5, "rho": 0.0},
    "modules": {"granularity": "module", "active_fraction": 0.2},
    "tensors": {"granularity": "tensor", "active_fraction": 0.1},
    "zeroth_order": {"method": "auto", "ascent": "zeroth_order", "ascent_sequences": 2},
    "sampa": {"method": "auto", "ascent": "sampa"},
    "bar": {"method": "bar"},
    "bi_lora": {"method": "auto", "ascent": "bi_lora", "active_fraction": 0.5},
    "flat_lora": {"method": "auto", "ascent": "flat_lora", "active_fraction": 0.5},
}


def _forward_from(cost, lowest_active, shape):
    """FLOPs of a pass that checks something once: forward from a block on, and the head's."""
    names = {name for block in cost.decoder.blocks[lowest_active:] for name in block.trainable}
    return cost.forward_flops(names, [shape]) + 2 * cost.decoder.head * Size.of([shape]).scored


def _stacked_forward(cost, shape):
    """FLOPs of a forward pass with two weights per factor, and the head's."""
    blocks = enumerate(cost.decoder.blocks)
    forward = sum(cost._passes(i, NONE, True, block.trainable).forward.on(Size.of([shape])) for i, block in blocks)
    return forward + 2 * cost.decoder.head * Size.of([shape]).scored


class _FedFromAbove(TrainerCallback):
    """Lets what enters the blocks depend on a parameter of the last one, without a product: no pass can be cut."""

    def __init__(self):
        self.trainer = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        above = self.trainer.slsam.arms[-1].parameters[0]

        def fed(module, args, kwargs):
            if args:
                return (args[0] + 0 * above.sum(), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 0 * above.sum()}

        self.trainer.slsam.arms.layout.blocks[0].register_forward_pre_hook(fed, with_kwargs=True)


@pytest.mark.parametrize(
    ("mode", "checkpointing"),
    [
        ("depth", True),
        ("depth", False),
        ("small_pass", True),
        *(pytest.param(m, True, marks=pytest.mark.slow) for m in ("sam", "remembered", "dense_descent")),
        pytest.param("sam", False, marks=pytest.mark.slow),
    ],
)
def test_passes_that_cannot_be_cut_are_priced_whole(build, mode, checkpointing):
    masks, feeding, config = _Masks(), _FedFromAbove(), SLSAMConfig(trace=False, **MODES[mode])
    trainer = build(
        CONFIGS["llama"], SLSAMTrainer, steps=3, checkpointing=checkpointing, slsam_config=config,
        callbacks=[masks],
    )  # fmt: skip
    trainer.add_callback(feeding)
    masks.trainer = feeding.trainer = trainer
    with counter() as count:
        trainer.train()
    assert any(found.what.startswith("passes are not cut") for found in trainer.slsam_fallbacks)
    cost = CostModel.from_model(trainer.model, checkpointing)
    shapes, rule = [(4, LENGTH)], replace(rule_of(config, rides=False), uncut=True)
    names = [active_names(trainer.slsam.arms, mask) for mask in masks.seen]
    # A gradient that is kept from the step before is not there in the first one.
    rules = [replace(rule, recalled=bool(step) if rule.ascent.stale else None) for step in range(3)]
    predicted = [cost.step(active, shapes, r) for active, r in zip(names, rules, strict=True)]
    assert sum(predicted) == pytest.approx(count.get_total_flops(), rel=COUNTED_FLOPS)
    logged = trainer.slsam.metrics["cost"]
    assert logged == pytest.approx(predicted[-1] / cost.plain(shapes), rel=COUNTED_FLOPS)


def _predicted_and_counted(build, mode, batch=4, micro_batches=1, checkpointing=True, family="llama"):
    masks, config = _Masks(), SLSAMConfig(trace=False, **mode)
    trainer = build(
        CONFIGS[family], SLSAMTrainer, batch, micro_batches, 3, checkpointing, slsam_config=config, callbacks=[masks]
    )
    masks.trainer = trainer
    with counter() as count:
        trainer.train()
    cost, arms = CostModel.from_model(trainer.model, checkpointing), trainer.slsam.arms
    shapes, steps = [(batch, LENGTH)] * micro_batches, len(masks.seen)
    rule = rule_of(config, rides=bool(trainer.slsam.runner.pairs))
    predicted = 0.0
    for step, mask in enumerate(masks.seen, 1):
        # The first step's ascent is a pass of its own, and behind the last one no batch comes.
        here = rule
        if rule.ascent.rides:
            joined = (batch + rule.ascent.riding(batch), LENGTH) if step < steps else None
            small = Part(rule.ascent.sequences)
            wanted = active_names(arms, masks.seen[step]) if step < steps else NONE
            here = replace(rule, ascent=small, recalled=step > 1, joined=joined, wanted=wanted)
        predicted += cost.step(active_names(arms, mask), shapes, here)
    # What is checked once: that a pass may start from a hidden state; that tokens are separate (three times forward).
    lowest_blocks = [min(a.depth for a, on in zip(arms, mask.tolist(), strict=True) if on) for mask in masks.seen]
    checked = next((lowest_active for lowest_active in lowest_blocks if lowest_active > 0), None)
    if rule.reused_shapes(shapes) and checked is not None:
        predicted += _forward_from(cost, checked, shapes[0])
    if rule.reused_shapes(shapes) and rule.descent == "all":
        # The first pass that is cut at a block watches what reaches block 0, and what comes back over the cut.
        for watched in (i for low in {low for low in lowest_blocks if low > 0} for i in (0, low)):
            trained = cost.decoder.blocks[watched].trainable
            with_input, without = (cost._passes(watched, trained, input_grad).back for input_grad in (True, False))
            predicted += with_input.minus(without).on(Size.of(shapes[:1]))
    if rule.ascent.rides:
        predicted += 3 * _stacked_forward(cost, (batch + rule.ascent.riding(batch), LENGTH))
    return predicted, count.get_total_flops()


slow = pytest.mark.slow
ALWAYS = ("auto", "sam", "paper", "depth", "small_pass", "bi_lora", "zeroth_order")  # the others in the slow run


@pytest.mark.parametrize("mode", [m if m in ALWAYS else pytest.param(m, marks=slow) for m in MODES])
def test_our_steps_for_the_lowest_blocks_drawn(build, mode):
    predicted, counted = _predicted_and_counted(build, MODES[mode])
    assert predicted == pytest.approx(counted, rel=COUNTED_FLOPS)


@pytest.mark.parametrize(
    "mode",
    [
        "auto",
        *(pytest.param(m, marks=slow) for m in ("depth", "small_pass", "partial", "remembered", "dense_descent")),
    ],
)
@pytest.mark.parametrize(("batch", "micro_batches"), [(2, 4), pytest.param(1, 4, marks=slow)])
def test_our_steps_under_accumulation(build, mode, batch, micro_batches):
    predicted, counted = _predicted_and_counted(build, MODES[mode], batch, micro_batches)
    assert predicted == pytest.approx(counted, rel=COUNTED_FLOPS)


@pytest.mark.parametrize(
    "mode", ["auto", *(pytest.param(m, marks=slow) for m in ("depth", "dense_descent", "small_pass"))]
)
def test_our_steps_without_checkpointing(build, mode):
    predicted, counted = _predicted_and_counted(build, MODES[mode], checkpointing=False)
    assert predicted == pytest.approx(counted, rel=COUNTED_FLOPS)


@pytest.mark.parametrize("family", ["gemma3", *(pytest.param(f, marks=slow) for f in ("qwen2", "gpt2", "opt"))])
def test_our_steps_in_other_families(build, family):
    predicted, counted = _predicted_and_counted(build, MODES["depth"], family=family)
    assert predicted == pytest.approx(counted, rel=COUNTED_FLOPS)
