"""Tiny decoders of several families with LoRA on every linear layer, built from configs, in float64."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = 64
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **_TOKENS}

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {**_SHAPE, "num_hidden_layers": 5, "num_key_value_heads": 2}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {**_SHAPE, "num_hidden_layers": 5, "num_key_value_heads": 2}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {**_SHAPE, "num_hidden_layers": 6, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, **_TOKENS},
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
            "layerdrop": 0.0,
            **_TOKENS,
        },
    ),
}


def decoder(family="llama", checkpointing=None, dropout=0.1, dtype=torch.float64, device="cpu", **lora):
    """Return a decoder in training mode with non-zero adapters.

    Args:
        family: A key of `FAMILIES`.
        checkpointing: `None`, or `use_reentrant` of gradient checkpointing.
        dropout: LoRA dropout.
        dtype: Of all weights.
        device: Where it lies.
        lora: More arguments of `LoraConfig`.
    """
    torch.manual_seed(0)
    cls, config, shape = FAMILIES[family]
    with torch.device(device):
        model = cls(config(**shape)).to(dtype)
        settings = {
            "r": 3,
            "target_modules": "all-linear",
            "lora_dropout": dropout,
            "fan_in_fan_out": family == "gpt2",
            **lora,
        }
        model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.device.type != "meta":
                parameter.copy_(0.05 * torch.randn_like(parameter))
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model.train()


def batch(rows=3, length=12, device="cpu"):
    """Return a batch of random tokens with some padding in its first row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (rows, length), generator=generator).to(device)
    attention = torch.ones_like(ids)
    attention[0, length - 3 :] = 0
    if ids.is_meta:  # transformers itself reads the values of a padding mask, and passes a whole one on
        attention = torch.zeros(rows, 1, length, length, device=device)
    return {"input_ids": ids, "attention_mask": attention, "labels": ids, "use_cache": False}


def passes_of(forward):
    """Return a closure that runs forward and backward, and one that runs the forward alone.

    Args:
        forward: Takes nothing and returns the loss.
    """

    def closure():
        loss = forward()
        loss.backward()
        return loss

    def forward_only():
        with torch.no_grad():
            return forward()

    return closure, forward_only


def closures(model, inputs):
    """Return the passes of a language model over a batch."""
    return passes_of(lambda: model(**inputs).loss)


def move(model):
    """Move what is trained away from where it starts: adapters start as nothing, which many faults leave unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def in_training(model, checkpointing=None):
    """Return a model in training mode with non-zero adapters; `checkpointing` as in `decoder`."""
    torch.manual_seed(1)
    move(model)
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model.train()


def adapted(config):
    """Return a tiny Llama with adapters of any kind, in float64."""
    torch.manual_seed(0)
    cls, settings, shape = FAMILIES["llama"]
    model = get_peft_model(cls(settings(**shape)), config, autocast_adapter_dtype=False).double()
    return move(model).train()
