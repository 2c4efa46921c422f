"""Predicted memory against the peak of live tensors in a whole `trainer.train()` run, on the CPU."""

import copy
import functools
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import SFTConfig, SFTTrainer

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.algorithm.ascents import Ascent
from slsam_peft.cost import memory as footprint
from slsam_peft.cost.expected import rule_of
from slsam_peft.cost.model import CostModel, Rule
from slsam_peft.models.shapes import meta_model
from tests.integration.test_cost_flops import WORDS, tokenizer
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
    "bi_lora": ({"method": "bi_lora"}, 1, True),
    "flat_lora": ({"method": "flat_lora"}, 1, True),
}


def trained(folder, settings, micro_batches=1, checkpointing=True):
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
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
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


@pytest.mark.parametrize(("dtype", "noise_bytes"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_what_rules_of_other_papers_hold_is_counted_in_its_own_dtype(dtype, noise_bytes):
    """A second adapter and its moments are in float32 beside one in half precision, too; noise becomes the sum."""
    model = meta_model(copy.deepcopy(CONFIG), dtype, lora_r=8, float32_adapters=False)  # which notes the dtype in it
    settings = footprint.MemorySettings(compute_dtype=dtype)
    cost, shapes = CostModel.from_model(model, True), [(BATCH, LENGTH)]
    bi_lora, flat_lora = (
        footprint.memory_of(model, cost, shapes, rule_of(SLSAMConfig(method=method)), settings)
        for method in ("bi_lora", "flat_lora")
    )
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert bi_lora["adapters"] == numbers * dtype.itemsize
    assert (bi_lora["second_adapter"], bi_lora["noise"]) == (3 * 4 * numbers, 0)
    largest = CONFIG.hidden_size * CONFIG.intermediate_size
    assert (flat_lora["second_adapter"], flat_lora["noise"]) == (0, noise_bytes * largest)
