"""Predicted memory against the peak of live tensors in a whole `trainer.train()` run, on the CPU."""

import copy
import functools
import weakref
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import SFTConfig, SFTTrainer

from slsam_peft import SLSAM, SLSAMConfig, SLSAMTrainer, arms_of
from slsam_peft.algorithm.adversary import Adversary
from slsam_peft.algorithm.ascents import Ascent
from slsam_peft.cost import memory as footprint
from slsam_peft.cost.expected import rule_of
from slsam_peft.cost.model import CostModel, Rule
from slsam_peft.models.shapes import meta_model
from slsam_peft.presets import ASCENTS
from slsam_peft.trainer.factors import factors_of
from slsam_peft.trainer.riding import lora_pairs
from tests.decoders import batch, closures, decoder
from tests.integration.test_cost_flops import WORDS, tokenizer
from tests.look_ahead import look_ahead_passes
from tests.tolerances import PEAK_MEMORY

BATCH, LENGTH = 4, 128
CONFIG = LlamaConfig(
    vocab_size=WORDS, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operations return, and of those it is given."""

    def __init__(self, tensors):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0
        for tensor in tensors:
            self._see(tensor)

    def _see(self, tensor):
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return

        def gone(_, key=key, size=size):
            if self.live.pop(key, None) is not None:
                self.now -= size

        self.live[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._see(leaf)
        return result


SMALL_BYTES = 2**16  # norms, random states, index tensors

# Settings, micro-batches, checkpointing.
CASES = {
    "plain": (None, 1, True),
    "plain_without_checkpointing": (None, 1, False),
    "auto": ({}, 1, True),
    "auto_two_sequences": ({"ascent_sequences": 2}, 1, True),
    "auto_accumulated": ({}, 3, True),
    "small_pass": ({"method": "auto", "ascent": "partial"}, 1, True),
    "sam": ({"method": "sam"}, 1, True),
    "two_pass": ({"design": "depth", "active_fraction": 0.5}, 2, True),
    "remembered": ({"design": "depth", "active_fraction": 1.0, "ascent": "remembered"}, 1, True),
    "dense_descent": ({"design": "depth", "active_fraction": 0.2, "descent": "all"}, 3, True),
    "sampa": ({"method": "auto", "ascent": "sampa"}, 1, True),
    "bi_lora": ({"method": "bi_lora"}, 1, True),
    "flat_lora": ({"method": "flat_lora"}, 1, True),
}


def trained(folder, settings, micro_batches=1, checkpointing=True, rank=8):
    """Train three steps on random tokens; return the trainer and the peak of its live bytes."""
    torch.manual_seed(0)
    ids = torch.randint(0, WORDS - 2, (BATCH * micro_batches * 3, LENGTH)).tolist()
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=micro_batches,
        activation_checkpointing=checkpointing,
        max_length=LENGTH,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    ours = {} if settings is None else {"slsam_config": SLSAMConfig(trace=False, **settings)}
    trainer = (SLSAMTrainer if ours else SFTTrainer)(
        AutoModelForCausalLM.from_config(CONFIG, attn_implementation="sdpa"),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        **ours,
    )
    with LiveBytes([*trainer.model.parameters(), *trainer.model.buffers()]) as counted:
        trainer.train()
    return trainer, counted.peak


@pytest.fixture
def small_head(monkeypatch):
    """With its usual tile of 32,768 words the head would outweigh a model of this size."""
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", WORDS)
    monkeypatch.setattr(footprint, "HEAD_WORDS", WORDS)


ALWAYS = ("plain", "auto", "remembered")  # the others in the slow run


@pytest.mark.parametrize("case", [c if c in ALWAYS else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_peak_of_a_run(case, tmp_path, small_head):
    settings, micro_batches, checkpointing = CASES[case]
    rule = Rule(ascent=Ascent()) if settings is None else rule_of(SLSAMConfig(**settings))
    _, peak = trained(tmp_path, settings, micro_batches, checkpointing)
    model = meta_model(CONFIG, torch.float32, lora_r=8)
    parts = footprint.memory_of(
        model,
        CostModel.from_model(model, checkpointing),
        [(BATCH, LENGTH)] * micro_batches,
        rule,
        footprint.MemorySettings(compute_dtype=torch.float32),
        1.0 if settings is None else SLSAMConfig(**settings).fraction,
    )
    assert parts["total"] - parts["runtime"] == pytest.approx(peak, rel=PEAK_MEMORY)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def plain_peak(tmp_path_factory):
    """Return a function from micro-batches to the peak of plain LoRA, measured once."""
    return functools.cache(lambda count: trained(tmp_path_factory.mktemp("plain"), None, count)[1])


@pytest.mark.parametrize("micro_batches", [1, slow(3)])
@pytest.mark.parametrize(
    "settings",
    [
        slow({"bandit": "paper", "active_fraction": 0.4}),
        slow({"active_fraction": 1.0}),
        slow({"design": "depth", "active_fraction": 0.5}),
        slow({"design": "depth", "active_fraction": 0.5, "ascent": "partial"}),
        {"design": "depth", "active_fraction": 0.5, "ascent": "remembered"},
        {"method": "auto", "ascent": "partial"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_peak_is_plain_loras_and_what_is_reported(settings, micro_batches, tmp_path, small_head, plain_peak):
    """Not above plain LoRA plus e and w + e, the kept hidden states and remembered gradients."""
    plain = plain_peak(micro_batches)
    trainer, peak = trained(tmp_path, settings, micro_batches)
    slsam = trainer.slsam
    adapters = sum(p.numel() * p.element_size() for p in slsam.runner.parameters)
    assert peak <= plain + 2 * adapters + slsam.horizon.peak_bytes + slsam.memory.bytes + SMALL_BYTES


def parts_of(dtype, rank=8, **settings):
    """Return the predicted parts of a step in so many bytes a number, and how many numbers are trained."""
    model = meta_model(copy.deepcopy(CONFIG), dtype, rank, float32_adapters=False)  # which notes the dtype in it
    config = SLSAMConfig(**settings)
    parts = footprint.memory_of(
        model,
        CostModel.from_model(model, True),
        [(BATCH, LENGTH)],
        rule_of(config),
        footprint.MemorySettings(compute_dtype=dtype),
        config.fraction,
    )
    return parts, sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("dtype", "noise_bytes"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_what_rules_of_other_papers_hold_is_counted_in_its_own_dtype(dtype, noise_bytes):
    """A second adapter and its moments are in float32 beside one in half precision, too; noise becomes the sum."""
    (bi_lora, numbers), (flat_lora, _) = (parts_of(dtype, method=method) for method in ("bi_lora", "flat_lora"))
    assert bi_lora["adapters"] == numbers * dtype.itemsize
    assert (bi_lora["kept_by_rule"], bi_lora["noise"]) == (3 * 4 * numbers, 0)
    largest = CONFIG.hidden_size * CONFIG.intermediate_size
    assert (flat_lora["kept_by_rule"], flat_lora["noise"]) == (0, noise_bytes * largest)


KEEPING = {name: name for name in ASCENTS if name != "auto"} | {"bi_lora by plain ascent": Adversary(0.1, adam=False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ascent", KEEPING.values(), ids=KEEPING)
def test_what_a_rule_keeps_from_step_to_step_is_what_is_counted(ascent, dtype):
    """Its own tensors and the gradients kept for the next step, in the state that a checkpoint holds."""
    model = decoder(dropout=0.0, dtype=dtype)
    config = SLSAMConfig(method="auto", ascent=ascent, active_fraction=1.0, descent="active")
    slsam = SLSAM(arms_of(model), config, pairs=lora_pairs(model), factors=factors_of(model))
    slsam.learning_rate = lambda p: 1e-3
    inputs = batch()
    inputs["labels"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    passes = look_ahead_passes(model, inputs, inputs)
    slsam.accumulate(replace(passes, cut=None, forward_only=closures(model, inputs)[1]))
    assert slsam.steps == 1
    assert slsam.skipped == 0
    rule, shapes = rule_of(config), [(len(inputs["labels"]), 12)]
    held = sum(x.nbytes for x in slsam.ascent.state_dict().values() if x.dim() == 2)
    assert held == rule.ascent.kept_bytes(slsam.parameters)
    numbers = sum(p.numel() for p in slsam.parameters)
    assert slsam.memory.bytes == 2 * numbers * footprint._remembered(rule, shapes, 1.0)


@pytest.mark.parametrize(("count", "expected"), [(1, 0.25), (2, 0.0)])
def test_gradients_that_rode_along_are_those_of_the_arms_that_come(count, expected):
    """A quarter of them is perturbed; with several micro-batches none ride along."""
    rule = rule_of(SLSAMConfig())
    assert footprint._remembered(rule, [(BATCH, LENGTH)] * count, SLSAMConfig().fraction) == expected


EVERYWHERE = {"method": "auto", "active_fraction": 1.0}
BESIDE = {  # what is compared with what, and how many more copies of the adapters it holds at the peak
    "sampa": ({**EVERYWHERE, "ascent": "sampa"}, {**EVERYWHERE, "ascent": "ahead"}, 1),
    "bi_lora": ({"method": "bi_lora"}, {"method": "bar"}, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BESIDE)
def test_what_a_rule_holds_more_than_another_one_is_counted(case, tmp_path, small_head):
    """How far riding tokens run from w; both pairs side by side and a second gradient, beside what is kept.

    Of adapters so large that the peak is where all of their gradients are there.
    """
    more, less, copies = BESIDE[case]
    both = (("more", more), ("less", less))
    measured = [trained(tmp_path / name, settings, rank=64)[1] for name, settings in both]
    predicted = [parts_of(torch.float32, rank=64, **settings)[0] for _, settings in both]
    adapters = predicted[0]["adapters"]
    assert predicted[0]["total"] - predicted[1]["total"] == copies * adapters
    assert measured[0] - measured[1] == pytest.approx(copies * adapters, rel=PEAK_MEMORY)
