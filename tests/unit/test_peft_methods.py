"""Every kind of adapter PEFT offers below the blocks gets the exact step: its parameters are found by structure."""

import peft
import pytest
import torch

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from tests.decoders import adapted, batch, closures
from tests.reference import assert_step_is_exact

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
METHODS = {
    "AdaLoRA": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=100, task_type="CAUSAL_LM", **TARGETS),
    "FourierFT": peft.FourierFTConfig(n_frequency=8, **TARGETS),
    "HRA": peft.HRAConfig(r=2, **TARGETS),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LoHa": peft.LoHaConfig(r=2, **TARGETS),
    "LoKr": peft.LoKrConfig(r=2, **TARGETS),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, **TARGETS),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "VB-LoRA": peft.VBLoRAConfig(num_vectors=4, vector_length=16, **TARGETS),
    "DoRA": peft.LoraConfig(r=2, use_dora=True, lora_dropout=0.1, **TARGETS),
    "LoRA with biases": peft.LoraConfig(r=2, lora_bias=True, **TARGETS),
    "LoRA and a trained head": peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    "LoRA and trained norms": peft.LoraConfig(r=2, modules_to_save=["norm", "input_layernorm"], **TARGETS),
    "LoRA on embeddings": peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "LoRA and trained tokens": peft.LoraConfig(r=2, trainable_token_indices=[3, 4, 5], **TARGETS),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_step_is_exact(method):
    model = adapted(method)
    closure, forward_only = closures(model, batch())
    for granularity in ("block", "module"):
        arms = arms_of(model, granularity)
        positions = torch.arange(len(arms))
        for mask in (positions >= len(arms) // 2, positions % 2 == 1, positions == len(arms) - 1):
            for descent in ("active", "all"):
                config = SLSAMConfig(rho=0.3, active_fraction=0.9, design=lambda p, g, m=mask: m, descent=descent)
                assert_step_is_exact(SLSAM(arms, config), mask, closure, forward_only)
