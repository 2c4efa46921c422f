"""The price of whole trainings, counted: at plain LoRA's with exact gradients, well below with cheaper ascents."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from slsam_peft import SLSAMConfig, SLSAMTrainer

pytestmark = pytest.mark.slow

STEPS, BATCH, LENGTH, WORDS = 16, 4, 64, 500

# settings, least and most allowed ratio to plain SFTTrainer
REACH = {
    "the paper's sampling": (SLSAMConfig(bandit="paper", active_fraction=0.2), 1.5, 1.9),
    "dense SAM": (SLSAMConfig(method="sam"), 1.97, 2.02),
    "a small pass": (SLSAMConfig(method="auto", ascent="partial"), 1.2, 1.26),
    "exact, at plain LoRA's price": (SLSAMConfig(design="depth", cost_budget=1.0), 0.95, 1.02),
    "ascent on a quarter": (SLSAMConfig(ascent="partial", design="depth", cost_budget=0.75), 0.70, 0.77),
    "remembered ascent": (SLSAMConfig(ascent="remembered", design="depth", cost_budget=0.65), 0.60, 0.67),
    "sparse ascent, dense descent": (SLSAMConfig(descent="all", design="depth", cost_budget=1.25), 1.2, 1.28),
}
PREDICTION = 0.02  # relative: the one-off reuse check and the rotary products of the lowest blocks are not predicted


def train(cls, **kwargs):
    """Train the thin 32-block Llama of the bar and return the trainer with the FLOPs of the whole `train()`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="eager",  # the counter has no formula for the CPU's fused attention
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )
    )
    words = {f"w{i}": i for i in range(WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w1", eos_token="w2"
    )
    rows = torch.randint(3, WORDS, (BATCH * STEPS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    args = SFTConfig(
        kwargs.pop("folder"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = cls(
        model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        **kwargs,
    )
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    return trainer, counter.get_total_flops()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(SFTTrainer, folder=str(tmp_path_factory.mktemp("plain")))[1]


@pytest.mark.parametrize("name", REACH)
def test_counted_cost_is_within_reach_and_as_predicted(name, plain, tmp_path):
    config, least, most = REACH[name]
    trainer, flops = train(SLSAMTrainer, folder=str(tmp_path), slsam_config=replace(config, trace=False))
    ratio = flops / plain
    assert least <= ratio <= most
    predicted = [log["slsam/cost"] for log in trainer.state.log_history if "slsam/cost" in log]
    assert len(predicted) == STEPS
    assert sum(predicted) / STEPS == pytest.approx(ratio, rel=PREDICTION)


@pytest.mark.parametrize("name", ["exact, at plain LoRA's price", "ascent on a quarter", "remembered ascent"])
def test_every_arm_is_trained_in_some_steps(name, tmp_path):
    """No saving by never training the lower blocks: the least inclusion probability is a tenth of the mean."""
    config, _, _ = REACH[name]
    trainer, _ = train(SLSAMTrainer, folder=str(tmp_path), slsam_config=replace(config, trace=False))
    sampler = trainer.slsam.sampler
    inclusion = sampler.scheme.inclusion(sampler.probabilities)
    assert inclusion.min() >= config.min_probability * sampler.mean - 1e-12
    drawn = torch.stack([sampler.draw().mask for _ in range(400)])
    assert drawn.any(0).all()
