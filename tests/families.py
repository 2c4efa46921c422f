"""Tiny models of families that run in ways of their own, built from configs, in float64, and batches for them."""

from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from tests.architectures import ARCHITECTURES, BASE, IMAGE, TOKENS, WORDS
from tests.decoders import in_training

_DECODER = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {
    **_DECODER,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.001,
}
_SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    **TOKENS,
}
_SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
    "pad_token_id": 0,
}

# Class, without its ending, of model and config; settings; where LoRA goes.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_EXPERTS, "decoder_sparse_step": 1}, ["q_proj"]),
    "qwen3-moe every other": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_EXPERTS, "decoder_sparse_step": 2},
        ["q_proj"],
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _EXPERTS, ["q_proj"]),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", _EXPERTS, ["q_proj"]),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_EXPERTS,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        ["q_proj", "x_proj"],
    ),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_EXPERTS,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        ["q_proj", "out_proj"],
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 4, "n_head": 4, **TOKENS},
        ["query_key_value"],
    ),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": WORDS, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64},
        ["Wqkv"],
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**{k: v for k, v in BASE.items() if k != "intermediate_size"}, "attn_implementation": "eager"},
        ["query_key_value"],
    ),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 4,
            "max_position_embeddings": 64,
            **TOKENS,
        },
        ["q_proj", "v_proj"],
    ),
    "roformer": (
        "RoFormerForSequenceClassification",
        "RoFormerConfig",
        {**BASE, "embedding_size": 32, "num_labels": 3},
        ["query", "value"],
    ),
    "megatron-bert": (
        "MegatronBertForSequenceClassification",
        "MegatronBertConfig",
        {**BASE, "num_labels": 3},
        ["query", "value"],
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**BASE, "num_labels": 3, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ["query_proj", "value_proj"],
    ),
    "xlnet": (
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {"vocab_size": WORDS, "d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48, "num_labels": 3},
        ["layer_1", "layer_2"],
    ),
    "albert": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {**BASE, "embedding_size": 16, "num_labels": 3},
        ["query", "value", "embedding_hidden_mapping_in"],
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**BASE, "num_labels": 3},
        ["query", "value"],
    ),
    "xlm-roberta": (
        "XLMRobertaForSequenceClassification",
        "XLMRobertaConfig",
        {**BASE, "num_labels": 3},
        ["query", "value"],
    ),
    "camembert": (
        "CamembertForSequenceClassification",
        "CamembertConfig",
        {**BASE, "num_labels": 3},
        ["query", "value"],
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**_SEQ2SEQ, "max_position_embeddings": 64},
        r".*decoder.*(q_proj|v_proj)",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32},
        r".*decoder.*(q_proj|v_proj)",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 4,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            **TOKENS,
        },
        r".*decoder.*\.(q|v)",
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, ["q_proj", "v_proj"]),
    **ARCHITECTURES,
}


def model_of(family, checkpointing=None, lora=None, adapter=None, **settings):
    """Return a model in training mode with non-zero adapters.

    Args:
        family: A key of `FAMILIES`.
        checkpointing: `None`, or `use_reentrant` of gradient checkpointing.
        lora: More arguments of `LoraConfig`.
        adapter: Another adapter's config in place of LoRA's.
        settings: More settings of the model's config.
    """
    torch.manual_seed(0)
    name, config, base, targets = FAMILIES[family]
    eager = {"experts_implementation": "eager"} if "num_experts" in base else {}
    settings = {**base, **settings}
    model = getattr(transformers, name)._from_config(getattr(transformers, config)(**settings), **eager).double()
    task = {"task_type": "SEQ_CLS"} if name.endswith("ForSequenceClassification") else {}
    if "num_labels" in base and not task:
        task = {"modules_to_save": ["classifier"]}
    adapter = adapter or LoraConfig(**{"r": 2, "target_modules": targets, **task, **(lora or {})})
    model = get_peft_model(model, adapter, autocast_adapter_dtype=False).double()
    model = in_training(model, checkpointing)
    if name.startswith("Swin"):  # its embeddings return a tuple, which `enable_input_require_grads` cannot take
        model.get_input_embeddings()._forward_hooks.clear()
    if checkpointing is not None and name.startswith("Speech2Text"):  # `enable_input_require_grads` misses its encoder
        model.base_model.model.model.encoder.conv.register_forward_hook(lambda m, a, out: out.requires_grad_())
    return model


def batch_of(family, rows=3):
    """Return a batch of so many sequences for a family."""
    generator = torch.Generator().manual_seed(rows)
    model, _, settings, _ = FAMILIES[family]
    ids = torch.randint(3, IMAGE, (rows, 8), generator=generator)
    attention = torch.ones_like(ids)

    def noise(*shape):
        return torch.randn(rows, *shape, generator=generator).double()

    if model.endswith("ForCTC"):
        return {"input_values": noise(800), "labels": ids[:, :4] % 29 + 3}
    if model.startswith(("Whisper", "Speech2Text")):
        features = noise(8, 40)
        return {"input_features": features if model[0] == "W" else features.transpose(1, 2), "labels": ids}
    if model.startswith("Moonshine"):
        return {"input_values": noise(4000), "labels": ids}
    if model.startswith("AST"):
        return {"input_values": noise(16, 8), "labels": torch.arange(rows) % 3}
    if model.endswith("ForImageClassification"):
        return {
            "pixel_values": noise(3, 32, 32)
            if "image_size" not in settings
            else noise(3, settings["image_size"], settings["image_size"]),
            "labels": torch.arange(rows) % 3,
        }
    if "vision_config" in settings:
        return _with_images(model, ids, noise)
    if "num_labels" in settings:
        return {"input_ids": ids, "attention_mask": attention, "labels": torch.arange(rows) % 3}
    if model.endswith("ForMaskedLM"):
        return {"input_ids": ids, "attention_mask": attention, "labels": ids}
    return {"input_ids": ids, "attention_mask": attention, "labels": ids, "use_cache": False}


def _with_images(model, ids, noise):
    """Return texts with an image in each."""
    rows = len(ids)
    attention = torch.ones_like(ids)
    images = {"input_ids": ids, "attention_mask": attention, "pixel_values": noise(3, 16, 16)}
    if model in ("CLIPModel", "SiglipModel"):
        return {**images, "return_loss": True}
    patches = torch.full((rows, 4), IMAGE)
    if model.startswith("Qwen"):  # which count patches, and merge four of them
        ids = torch.cat([patches[:, :1] + 2, patches, patches[:, :1] + 3, ids], dim=1)
        images |= {
            "pixel_values": noise(16, 3 * 2 * 8 * 8).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    elif model.startswith("Mllama"):
        images |= {
            "pixel_values": noise(1, 1, 3, 16, 16),
            "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(rows, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(rows, 8, 1, 1, dtype=torch.long),
        }
    else:
        ids = torch.cat([patches, ids], dim=1)
        images["token_type_ids"] = (ids == IMAGE).int()
        if model.startswith("Idefics3"):
            images["pixel_values"] = images["pixel_values"][:, None]
        if not model.startswith(("Gemma3", "PaliGemma")):
            del images["token_type_ids"]
    return {**images, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
