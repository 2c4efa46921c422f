"""Builds models from their configuration alone: on the meta device, without weights."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from slsam_peft.errors import UserError
from slsam_peft.models.gemma3 import GEMMA3
from slsam_peft.models.load import load_config, refused
from slsam_peft.models.smollm2 import SMOLLM2
from slsam_peft.names import hint_at

_LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_QWEN_2 = {"model_type": "qwen2", "max_position_embeddings": 32768}
_QWEN_3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}


def _shape(
    base: dict[str, Any], width: int, inner: int, layers: int, heads: int, kv: int, **more: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**base, **sizes, "num_attention_heads": heads, "num_key_value_heads": kv, **more}


# Sizes from the config.json of the repository named in each comment, on huggingface.co.
BUILT_IN: dict[str, dict[str, Any]] = {
    # meta-llama/Llama-3.1-8B, -70B
    "llama-3.1-8b": _shape(_LLAMA_3, 4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _shape(_LLAMA_3, 8192, 28672, 80, 64, 8),
    # meta-llama/Llama-3.2-1B, -3B
    "llama-3.2-1b": _shape(_LLAMA_3, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _shape(_LLAMA_3, 3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    # mistralai/Mistral-7B-v0.3
    "mistral-7b": _shape({"model_type": "mistral", "vocab_size": 32768}, 4096, 14336, 32, 32, 8, sliding_window=None),
    # Qwen/Qwen2.5-0.5B, -7B
    "qwen2.5-0.5b": _shape(_QWEN_2, 896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-7b": _shape(_QWEN_2, 3584, 18944, 28, 28, 4, vocab_size=152064),
    # Qwen/Qwen3-8B
    "qwen3-8b": _shape(_QWEN_3, 4096, 12288, 36, 32, 8),
    # HuggingFaceTB/SmolLM2-135M
    "smollm2-135m": _shape(
        {"model_type": "llama", "vocab_size": 49152}, 576, 1536, 30, 9, 3, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    # google/gemma-3-270m
    "gemma-3-270m": _shape(
        {"model_type": "gemma3_text", "vocab_size": 262144}, 640, 2048, 18, 4, 1, head_dim=256,
        max_position_embeddings=32768, sliding_window=512, query_pre_attn_scalar=256, tie_word_embeddings=True,
    ),
}  # fmt: skip
SHAPE_OF = {SMOLLM2: "smollm2-135m", GEMMA3: "gemma-3-270m"}  # of the models that are fetched by a short name


def find_config(model: str) -> PreTrainedConfig:
    """Return the configuration of a language model, that of a larger model's text part included; as `whole_config`."""
    return whole_config(model).get_text_config()


def whole_config(model: str) -> PreTrainedConfig:
    """Return the configuration of a built-in shape, a local folder or file, or a repository on the Hub.

    Args:
        model (`str`): A name in `BUILT_IN`, `"smollm2"`, `"gemma3"`, a folder with a `config.json`, a JSON file, or a
            Hub ID. Code from the repository is never run.

    Raises:
        UserError: there is no such configuration, it cannot be read, or its architecture is not known.
    """
    if not os.path.exists(model):
        shape = SHAPE_OF.get(model, model.lower())
        if shape in BUILT_IN:
            return AutoConfig.for_model(**BUILT_IN[shape])
    hint = hint_at(model, BUILT_IN)
    if hint and "/" not in model and not os.path.exists(model):
        raise UserError(f"there is no built-in shape {model!r}.{hint} There are: {', '.join(BUILT_IN)}.")
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "config.json")):
        raise UserError(f"the folder {model!r} holds no config.json; pass a model's own folder, or the file itself.")
    try:
        return load_config(os.path.expanduser(model))
    except UserError as error:
        raise UserError(
            f"no configuration for model {model!r}: {first_line(error.__cause__ or error)}{hint}\n"
            f"Pass a built-in shape ({', '.join(BUILT_IN)}), a folder or file with a config.json that transformers "
            "knows, or the ID of a repository that can be reached."
        ) from error


def meta_model(
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    lora_r: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    float32_adapters: bool = True,
) -> PeftModel:
    """Build a causal language model with LoRA adapters on the meta device.

    Args:
        config (`PreTrainedConfig`): Its configuration.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Dtype of its weights.
        lora_r (`int`, *optional*, defaults to `16`): Rank of the adapters.
        target_modules (`str` or `Sequence[str]`, *optional*, defaults to `"all-linear"`): As in `LoraConfig`.
        float32_adapters (`bool`, *optional*, defaults to `True`): Adapters in float32 instead of `dtype`.

    Raises:
        UserError: the architecture has no causal language model, or the target modules are not in it.
    """
    config.quantization_config = None
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    lora = LoraConfig(r=lora_r, target_modules=targets, task_type="CAUSAL_LM")
    with refused(f"cannot build a {config.model_type!r} model with LoRA"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(p.requires_grad for p in own):
            module.to(torch.float32 if float32_adapters else dtype)
    return model


def first_line(error: BaseException) -> str:
    """Return an error's first line, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
