"""Tiny bases and adapters on disk, for the commands that take an adapter."""

import json

import peft
import torch
from transformers import GenerationConfig

from tests.tiny import llama, lora, tokenizer


def save_base(folder, dtype=torch.float32, **settings):
    """Write a tiny Llama with tokenizer and generation config as a user would have it; return the model."""
    model = llama(**settings).to(dtype)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=2, pad_token_id=1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def adapted(base, config=None, scale=0.1):
    """Return `base` with an adapter whose trainable weights are all moved away from their start."""
    model = peft.get_peft_model(base, config or lora(task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_adapter(folder, base_folder, config=None, **settings):
    """Write base and adapter; return the PEFT model that was saved."""
    base = save_base(base_folder, **settings)
    base.config._name_or_path = base.name_or_path = str(base_folder)
    model = adapted(base, config)
    model.save_pretrained(folder)
    settings_file = folder / "adapter_config.json"
    named = json.loads(settings_file.read_text()) | {"base_model_name_or_path": str(base_folder)}
    settings_file.write_text(json.dumps(named))
    return model


def logits(model, vocab=200):
    ids = torch.arange(5, 45).reshape(2, 20) % vocab
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits
