"""Configs of more families: decoders, experts, state spaces, encoders, encoder-decoders, speech, vision and both.

A row has the class of model and of config, settings, and where LoRA goes, as in `tests.families`.
"""

from typing import Any

WORDS = 64
IMAGE = 40  # the id that stands for a patch of an image

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    **TOKENS,
}
_GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 16,
}
_MOE = {**_GROUPED, **_EXPERTS}
_LATENT = {  # multi-head latent attention
    **BASE,
    **_EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_GPT = {
    "vocab_size": WORDS,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 64,
    "n_ctx": 64,
    **TOKENS,
}
_HEAD = {"num_labels": 3}
_SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    **TOKENS,
}
_T5 = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "decoder_start_token_id": 0,
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
    "ctc_loss_reduction": "mean",
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    **_HEAD,
}
_TOWER = {**{k: v for k, v in _VISION.items() if k != "num_labels"}, "projection_dim": 16}
_STAGES = {"depths": [1, 1, 2], "num_labels": 3, "image_size": 32, "patch_size": 2, "num_channels": 3}
_TEXT = {**_GROUPED, "num_key_value_heads": 4}


def _paired(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision, "projection_dim": 16, **more}


_QWEN_VL = {
    "text_config": {**_GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    "image_token_id": IMAGE,
    "video_token_id": IMAGE + 1,
    "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}
_LINEAR = "all-linear"
Row = tuple[str, str, dict[str, Any], Any]


def _causal(name: str, settings: dict[str, Any], targets: Any = _LINEAR, config: str = "", **more: Any) -> Row:
    return f"{name}ForCausalLM", f"{config or name}Config", {**settings, **more}, targets


def _headed(name: str, targets: Any = _LINEAR, **more: Any) -> Row:
    return f"{name}ForSequenceClassification", f"{name}Config", {**BASE, **_HEAD, **more}, targets


def _translating(name: str, targets: Any = _LINEAR, base: dict[str, Any] = _SEQ2SEQ, **more: Any) -> Row:
    return f"{name}ForConditionalGeneration", f"{name}Config", {**base, **more}, targets


def _hearing(name: str, **more: Any) -> Row:
    return f"{name}ForCTC", f"{name}Config", {**_SPEECH, **more}, _LINEAR


def _seeing(name: str, base: dict[str, Any] = _VISION, **more: Any) -> Row:
    return f"{name}ForImageClassification", f"{name}Config", {**base, **more}, _LINEAR


_DECODERS = {
    "llama": _causal("Llama", _GROUPED),
    "llama with biases": _causal("Llama", _GROUPED, attention_bias=True, mlp_bias=True),
    "mistral": _causal("Mistral", _GROUPED, sliding_window=4),
    "ministral": _causal("Ministral", _GROUPED),
    "qwen2": _causal("Qwen2", _GROUPED, tie_word_embeddings=True),
    "qwen3": _causal("Qwen3", _GROUPED),
    "gemma": _causal("Gemma", _GROUPED),
    "gemma2": _causal("Gemma2", _GROUPED, sliding_window=4),
    "gemma3": _causal("Gemma3", _GROUPED, config="Gemma3Text", sliding_window=4),
    "vault-gemma": _causal("VaultGemma", _GROUPED),
    "phi": _causal("Phi", BASE),
    "phi3": _causal("Phi3", _GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT, _LINEAR),
    "gpt-bigcode": _causal("GPTBigCode", _GPT),
    "gpt-neox": _causal("GPTNeoX", BASE),
    "gptj": _causal("GPTJ", _GPT, rotary_dim=4),
    "codegen": _causal("CodeGen", _GPT, rotary_dim=4),
    "opt": _causal("OPT", BASE, ffn_dim=48, word_embed_proj_dim=32),
    "xglm": _causal("XGLM", {}, vocab_size=WORDS, d_model=32, ffn_dim=48, num_layers=4, attention_heads=4, **TOKENS),
    "biogpt": _causal("BioGpt", BASE),
    "starcoder2": _causal("Starcoder2", _GROUPED),
    "cohere": _causal("Cohere", _GROUPED),
    "cohere2": _causal("Cohere2", _GROUPED, sliding_window=4),
    "olmo": _causal("Olmo", _GROUPED),
    "olmo2": _causal("Olmo2", _GROUPED),
    "olmo3": _causal("Olmo3", _GROUPED),
    "granite": _causal("Granite", _GROUPED),
    "stablelm": _causal("StableLm", _GROUPED),
    "glm": _causal("Glm", _GROUPED),
    "glm4": _causal("Glm4", _GROUPED),
    "smollm3": _causal("SmolLM3", _GROUPED),
    "nemotron": _causal("Nemotron", _GROUPED),
    "persimmon": _causal("Persimmon", BASE),
    "helium": _causal("Helium", _GROUPED),
    "exaone4": _causal("Exaone4", _GROUPED),
    "ernie4.5": _causal("Ernie4_5", _GROUPED),
    "diff-llama": _causal("DiffLlama", _GROUPED),
    "arcee": _causal("Arcee", _GROUPED),
    "seed-oss": _causal("SeedOss", _GROUPED),
    "bitnet": _causal("BitNet", _GROUPED),
    "hunyuan": _causal("HunYuanDenseV1", _GROUPED),
    "nanochat": _causal("NanoChat", _GROUPED),
    "minicpm3": _causal("MiniCPM3", _LATENT),
    "hrm": _causal("HrmText", _GROUPED),
    "gemma3n": _causal(
        "Gemma3n",
        _GROUPED,
        config="Gemma3nText",
        intermediate_size=[48] * 4,
        num_kv_shared_layers=2,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
        vocab_size_per_layer_input=WORDS,
        hidden_size_per_layer_input=8,
    ),
    "gemma4": _causal(
        "Gemma4",
        _GROUPED,
        config="Gemma4Text",
        num_kv_shared_layers=2,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=WORDS,
        hidden_size_per_layer_input=8,
        global_head_dim=8,
    ),
}

_MIXTURES = {
    "qwen2-moe": _causal("Qwen2Moe", _MOE),
    "qwen3.5-moe": _causal("Qwen3_5Moe", {**_MOE, **_LINEAR_ATTENTION}, config="Qwen3_5MoeText"),
    "deepseek-v2": _causal("DeepseekV2", _LATENT),
    "deepseek-v3": _causal("DeepseekV3", _LATENT),
    "olmoe": _causal("Olmoe", _MOE),
    "flex-olmo": _causal("FlexOlmo", _MOE),
    "granite-moe": _causal("GraniteMoe", _MOE),
    "granite-moe-shared": _causal("GraniteMoeShared", _MOE, shared_intermediate_size=16),
    "phi-moe": _causal("Phimoe", _MOE, ["q_proj", "v_proj"]),
    "jetmoe": _causal("JetMoe", _MOE, kv_channels=8),
    "glm4-moe": _causal("Glm4Moe", _MOE, first_k_dense_replace=1, n_group=1, topk_group=1),
    "ernie4.5-moe": _causal("Ernie4_5_Moe", _MOE),
    "llama4": _causal("Llama4", _MOE, config="Llama4Text", targets=["q_proj", "v_proj", "gate_proj"]),
    "minimax": _causal("MiniMax", _MOE),
    "minimax-m2": _causal("MiniMaxM2", _MOE),
    "hunyuan-moe": _causal("HunYuanMoEV1", _MOE),
    "dbrx": _causal(
        "Dbrx",
        {},
        vocab_size=WORDS,
        d_model=32,
        n_heads=4,
        n_layers=4,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.01},
        output_router_logits=True,
        **TOKENS,
    ),
}

_RECURRENT = {
    "mamba": _causal("Mamba", BASE, ["in_proj", "x_proj", "dt_proj"], state_size=8, time_step_rank=4),
    "mamba2": _causal("Mamba2", BASE, ["in_proj"], state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=4),
    "falcon-mamba": _causal("FalconMamba", BASE, ["in_proj", "x_proj", "dt_proj"], state_size=8, time_step_rank=4),
    "falcon-h1": _causal(
        "FalconH1",
        _GROUPED,
        ["q_proj", "v_proj", "in_proj", "down_proj"],
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=4,
    ),
    "bamba": _causal(
        "Bamba",
        _GROUPED,
        ["q_proj", "v_proj", "in_proj", "down_proj"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=4,
        attn_layer_indices=[1, 3],
    ),
    "granite-hybrid": _causal(
        "GraniteMoeHybrid",
        _MOE,
        ["q_proj", "v_proj", "in_proj"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=4,
        shared_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "zamba2": _causal(
        "Zamba2",
        _GROUPED,
        ["q_proj", "v_proj", "in_proj"],
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=4,
        mamba_ngroups=1,
        chunk_size=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        num_mem_blocks=1,
        adapter_rank=4,
        layer_types=["linear_attention", "hybrid"] * 2,
    ),
    "recurrent-gemma": _causal("RecurrentGemma", _GROUPED, attention_window_size=8, lru_width=32),
    "rwkv": _causal("Rwkv", BASE, attention_hidden_size=32, context_length=64),
    "xlstm": _causal("xLSTM", BASE, num_heads=4, num_blocks=4, embedding_dim=32),
    "lfm2": _causal("Lfm2", _GROUPED),
    "olmo-hybrid": _causal("OlmoHybrid", _GROUPED),
    "nemotron-h": _causal(
        "NemotronH",
        _GROUPED,
        ["q_proj", "v_proj", "in_proj", "down_proj"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=4,
        hybrid_override_pattern="M*-M",
    ),
    "qwen3.5": _causal("Qwen3_5", {**_GROUPED, **_LINEAR_ATTENTION}, config="Qwen3_5Text"),
}

_ENCODERS = {
    "bert": _headed("Bert"),
    "bert, masked words": ("BertForMaskedLM", "BertConfig", BASE, _LINEAR),
    "xlm-roberta, masked words": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", BASE, _LINEAR),
    "roberta-prelayernorm": _headed("RobertaPreLayerNorm"),
    "xlm-roberta-xl": _headed("XLMRobertaXL"),
    "deberta-v1": _headed("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "modernbert": _headed("ModernBert"),
    "electra": _headed("Electra", embedding_size=16),
    "distilbert": _headed("DistilBert", ["q_lin", "v_lin", "lin1"], dim=32, n_layers=4, n_heads=4, hidden_dim=48),
    "mpnet": _headed("MPNet"),
    "ernie": _headed("Ernie"),
    "rembert": _headed("RemBert", input_embedding_size=16, output_embedding_size=16),
    "convbert": _headed("ConvBert", embedding_size=32, head_ratio=2),
    "squeezebert": _headed("SqueezeBert", ["query", "value"], embedding_size=32, q_groups=1, v_groups=1),
    "nystromformer": _headed("Nystromformer", segment_means_seq_len=8, num_landmarks=4, conv_kernel_size=3),
    "fnet": _headed("FNet"),
    "esm": _headed("Esm"),
    "eurobert": _headed("EuroBert", num_key_value_heads=2, head_dim=8),
    "nomic-bert": _headed("NomicBert"),
    "jina-v3": _headed("JinaEmbeddingsV3"),
    "longformer": _headed("Longformer", attention_window=4),
    "big-bird": _headed("BigBird", attention_type="original_full"),
    "mobilebert": _headed("MobileBert", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    "funnel": (
        "FunnelForSequenceClassification",
        "FunnelConfig",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
            "block_sizes": [2, 2],
            "num_decoder_layers": 1,
            **TOKENS,
            **_HEAD,
        },
        _LINEAR,
    ),
    "xlm": _headed("XLM", emb_dim=32, n_layers=4, n_heads=4, n_words=WORDS),
    "llama, classified": _headed("Llama", num_key_value_heads=2, head_dim=8),
    "gpt2, classified": ("GPT2ForSequenceClassification", "GPT2Config", {**_GPT, **_HEAD}, _LINEAR),
}

_TRANSLATORS = {
    "bart, both": _translating("Bart"),
    "mbart": _translating("MBart"),
    "pegasus": _translating("Pegasus"),
    "blenderbot": _translating("Blenderbot"),
    "m2m-100": _translating("M2M100"),
    "marian": ("MarianMTModel", "MarianConfig", _SEQ2SEQ, _LINEAR),
    "plbart": _translating("PLBart"),
    "led": _translating(
        "LED", attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64
    ),
    "prophetnet": _translating(
        "ProphetNet",
        base={k: v for k, v in _SEQ2SEQ.items() if "coder_" not in k or "ffn" in k or "start" in k},
        hidden_size=32,
        num_encoder_layers=3,
        num_decoder_layers=4,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
    ),
    "t5, both": _translating("T5", base=_T5),
    "mt5": _translating("MT5", base=_T5, feed_forward_proj="gated-gelu"),
    "umt5": _translating("UMT5", base=_T5),
    "long-t5": _translating("LongT5", base=_T5, local_radius=3),
    "switch": _translating(
        "SwitchTransformers",
        base=_T5,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=2,
        output_router_logits=True,
        router_jitter_noise=0.1,
    ),
    "t5, decoder alone": _translating("T5", r".*decoder.*\.(q|v|wo)", base=_T5),
    "mbart, decoder alone": _translating("MBart", r".*decoder.*(q_proj|v_proj|fc1)"),
    "bart, encoder alone": _translating("Bart", r".*encoder\.layers.*(q_proj|v_proj|fc1)"),
    "whisper, both": _translating("Whisper", num_mel_bins=8, max_source_positions=20, max_target_positions=32),
    "speech-to-text": _translating(
        "Speech2Text",
        num_mel_bins=8,
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=60,
        max_target_positions=32,
        conv_kernel_sizes=[3, 3],
    ),
    "moonshine": _translating(
        "Moonshine",
        base=BASE,
        encoder_num_hidden_layers=3,
        decoder_num_hidden_layers=4,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        decoder_start_token_id=1,
    ),
}

_SPEAKERS = {
    "hubert": _hearing("Hubert", layerdrop=0.0),
    "wavlm": _hearing("WavLM", layerdrop=0.0),
    "wav2vec2-conformer": _hearing("Wav2Vec2Conformer", layerdrop=0.0),
    "unispeech": _hearing("UniSpeech", layerdrop=0.0, num_ctc_classes=32),
    "data2vec-audio": _hearing("Data2VecAudio", layerdrop=0.0, conv_pos_kernel_size=3),
    "sew": _hearing("SEW", layerdrop=0.0, squeeze_factor=2),
    "ast": (
        "ASTForAudioClassification",
        "ASTConfig",
        {**_VISION, "patch_size": 4, "max_length": 16, "num_mel_bins": 8, "time_stride": 4, "frequency_stride": 4},
        _LINEAR,
    ),
}

_SEERS = {
    "vit": _seeing("ViT"),
    "deit": _seeing("DeiT"),
    "beit": _seeing("Beit", drop_path_rate=0.2),
    "dinov2": _seeing("Dinov2", mlp_ratio=2, drop_path_rate=0.2),
    "swin": _seeing("Swin", _STAGES, embed_dim=16, num_heads=[2, 2, 4], window_size=4),
    "swinv2": _seeing("Swinv2", _STAGES, embed_dim=16, num_heads=[2, 2, 4], window_size=4),
    "convnext": _seeing("ConvNext", _STAGES, hidden_sizes=[8, 16, 32], num_stages=3),
    "pvt-v2": _seeing(
        "PvtV2",
        {**_HEAD},
        image_size=32,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 2],
        num_attention_heads=[1, 2, 2, 4],
    ),
    "segformer": _seeing(
        "Segformer",
        {**_HEAD},
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 2],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
    ),
    "clip": ("CLIPModel", "CLIPConfig", _paired(_TEXT, _TOWER), _LINEAR),
    "siglip": ("SiglipModel", "SiglipConfig", _paired(_TEXT, _TOWER), _LINEAR),
}

_READERS = {
    "llava": _translating(
        "Llava",
        base=_paired({**_TEXT, "model_type": "llama"}, {**_TOWER, "model_type": "clip_vision_model"}),
        image_token_id=IMAGE,
        image_seq_length=4,
    ),
    "llava, language alone": _translating(
        "Llava",
        r".*language_model.*(q_proj|v_proj|down_proj)",
        base=_paired({**_TEXT, "model_type": "llama"}, {**_TOWER, "model_type": "clip_vision_model"}),
        image_token_id=IMAGE,
        image_seq_length=4,
    ),
    "pali-gemma": _translating(
        "PaliGemma",
        base=_paired(
            {**_TEXT, "model_type": "gemma"}, {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
        ),
        image_token_id=IMAGE,
        hidden_size=32,
        projection_dim=32,
    ),
    "gemma3, images": _translating(
        "Gemma3",
        base=_paired({**_TEXT, "sliding_window": 4}, {**_TOWER, "vision_use_head": False}),
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
    ),
    "idefics3": _translating(
        "Idefics3", base=_paired({**_TEXT, "model_type": "llama"}, _TOWER), image_token_id=IMAGE, scale_factor=1
    ),
    "internvl": _translating(
        "InternVL",
        base=_paired({**_TEXT, "model_type": "qwen2"}, {**_TOWER, "image_size": [16, 16], "patch_size": [8, 8]}),
        image_token_id=IMAGE,
        downsample_ratio=1.0,
        image_seq_length=4,
    ),
    "mllama": _translating(
        "Mllama",
        base={
            "text_config": {**_TEXT, "cross_attention_layers": [1, 3], "num_hidden_layers": 4},
            "vision_config": {
                **_TOWER,
                "num_global_layers": 1,
                "attention_heads": 4,
                "max_num_tiles": 1,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [1],
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": IMAGE,
        },
    ),
    "qwen2-vl": _translating(
        "Qwen2VL",
        base=_QWEN_VL,
        vision_config={
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            **_QWEN_VL,
            "vision_config": {
                "depth": 3,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "num_heads": 4,
                "intermediate_size": 48,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 32,
                "fullatt_block_indexes": [1],
            },
        },
        _LINEAR,
    ),
    "qwen3-vl": _translating(
        "Qwen3VL",
        base=_QWEN_VL,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 48,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
}

ARCHITECTURES: dict[str, Row] = {
    **_DECODERS,
    **_MIXTURES,
    **_RECURRENT,
    **_ENCODERS,
    **_TRANSLATORS,
    **_SPEAKERS,
    **_SEERS,
    **_READERS,
}
