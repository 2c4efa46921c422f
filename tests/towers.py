"""Tiny models of several stacks of blocks, with LoRA in all of them, in float64, and batches for them."""

import torch
import transformers
from peft import LoraConfig, get_peft_model

from tests.decoders import in_training

WORDS = 64
IMAGE, VIDEO, VISION_START, VISION_END = 62, 61, 60, 59

_TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {"depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1]}
_SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
        )
    )


def _bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**_SEQ2SEQ, max_position_embeddings=64))


def _whisper():
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**_SEQ2SEQ, **sizes))


def _llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**_TEXT)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )


def _qwen2_vl():
    vision = {"depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, "rope_scaling": _ROPE},
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
        **_IMAGES,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen3_vl():
    merging = {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 8, "rope_scaling": {**_ROPE, "mrope_interleaved": True}},
        vision_config={**_VISION, **merging, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
        **_IMAGES,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def _gemma3n():
    config = transformers.Gemma3nTextConfig(
        **{**_TEXT, "num_hidden_layers": 6, "intermediate_size": [48] * 6},
        head_dim=8,
        sliding_window=4,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=WORDS,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"] * 3,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 6,
    )
    return transformers.Gemma3nForCausalLM(config)


_IMAGES = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}

# How to build it, where LoRA goes, what else its batches hold.
TOWERS = {
    "t5": (_t5, ["q", "v", "wo"], None),
    "bart": (_bart, ["q_proj", "v_proj", "fc1"], None),
    "whisper": (_whisper, ["q_proj", "v_proj", "fc1"], "sound"),
    "llava": (_llava, "all-linear", "image"),
    "qwen2-vl": (_qwen2_vl, "all-linear", "patches"),
    "qwen3-vl": (_qwen3_vl, "all-linear", "patches"),
    "gemma3n": (_gemma3n, "all-linear", None),
}


def tower_of(family, checkpointing=None, targets=None):
    """Return a model in training mode with non-zero adapters.

    Args:
        family: A key of `TOWERS`.
        checkpointing: `None`, or `use_reentrant` of gradient checkpointing.
        targets: Where LoRA goes, in place of all stacks.
    """
    torch.manual_seed(0)
    build, everywhere, _ = TOWERS[family]
    adapter = LoraConfig(r=2, target_modules=targets or everywhere)
    model = get_peft_model(build().double(), adapter, autocast_adapter_dtype=False)
    return in_training(model, checkpointing)


def tower_batch(family, images=True):
    """Return a batch of two sequences for a family."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, 58, (2, 10), generator=generator)
    batch = {"input_ids": labels.clone(), "labels": labels, "use_cache": False}
    kind = TOWERS[family][2] if images else None
    if kind == "sound":
        del batch["input_ids"]
        batch["input_features"] = torch.randn(2, 8, 40, generator=generator).double()
    if kind == "image":
        batch["input_ids"][:, 1:5] = IMAGE
        batch["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator).double()
    if kind == "patches":
        batch["input_ids"][:, 1], batch["input_ids"][:, 2:6] = VISION_START, IMAGE
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        batch["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator).double()
    return batch
