"""Small random models of every architecture that is fine-tuned, and the cells that measure them.

Each has all the kinds of layers that its family has: dense and mixture of experts, sliding and full attention, linear
attention, encoder and decoder, images and text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.accuracy.cell import Cell

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
HEADS = SMALL | {"head_dim": 64}
ENCODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
BART: dict[str, Any] = {
    "d_model": 128,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 192,
    "decoder_ffn_dim": 192,
    "vocab_size": 512,
}
T5: dict[str, Any] = {
    "d_model": 128,
    "d_kv": 64,
    "d_ff": 192,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 2,
    "vocab_size": 512,
    "decoder_start_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
DEEPSEEK = SMALL | {
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"model_type": "llama"},
    "mistral": SMALL | {"model_type": "mistral", "sliding_window": None},
    "mistral-win": SMALL | {"model_type": "mistral", "sliding_window": 32},
    "mixtral": SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": SMALL | {"model_type": "qwen2"},
    "qwen3": HEADS | {"model_type": "qwen3"},
    "qwen3_moe": HEADS
    | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "qwen3_next": HEADS
    | {
        "model_type": "qwen3_next",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "qwen3_5": HEADS
    | {
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "lfm2": SMALL | {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv", "conv"]},
    "bamba": SMALL
    | {
        "model_type": "bamba",
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_chunk_size": 32,
    },
    "gemma2": HEADS
    | {
        "model_type": "gemma2",
        "sliding_window": 32,
        "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "gemma3_text": HEADS
    | {
        "model_type": "gemma3_text",
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "gemma": HEADS | {"model_type": "gemma"},
    "phi3": SMALL | {"model_type": "phi3", "pad_token_id": 0},
    "phi": SMALL | {"model_type": "phi"},
    "phimoe": SMALL | {"model_type": "phimoe", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 2, "vocab_size": 512},
    "gpt_neox": SMALL | {"model_type": "gpt_neox"},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "hidden_size": 128,
        "num_layers": 4,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 2]],
        "vocab_size": 512,
        "window_size": 32,
        "max_position_embeddings": 512,
    },
    "gptj": {"model_type": "gptj", "n_embd": 128, "n_layer": 4, "n_head": 2, "vocab_size": 512, "rotary_dim": 32},
    "opt": {
        "model_type": "opt",
        "hidden_size": 128,
        "ffn_dim": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 128,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 128, "n_layer": 4, "n_head": 2, "vocab_size": 512},
    "falcon": {
        "model_type": "falcon",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 512,
    },
    "falcon-new": {
        "model_type": "falcon",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 512,
        "new_decoder_architecture": True,
        "num_kv_heads": 1,
        "alibi": False,
    },
    "olmo2": SMALL | {"model_type": "olmo2"},
    "olmo3": SMALL | {"model_type": "olmo3", "sliding_window": 32},
    "smollm3": SMALL | {"model_type": "smollm3", "pad_token_id": 0},
    "cohere2": HEADS | {"model_type": "cohere2", "sliding_window": 32},
    "cohere": SMALL | {"model_type": "cohere"},
    "granite": SMALL | {"model_type": "granite"},
    "deepseek_v2": DEEPSEEK | {"model_type": "deepseek_v2", "topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK | {"model_type": "deepseek_v3"},
    "gpt_oss": HEADS
    | {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "llama4_text": HEADS
    | {
        "model_type": "llama4_text",
        "num_local_experts": 4,
        "intermediate_size_mlp": 192,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 32,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "mamba": {"model_type": "mamba", "hidden_size": 128, "state_size": 8, "num_hidden_layers": 4, "vocab_size": 512},
    "falcon_mamba": {
        "model_type": "falcon_mamba",
        "hidden_size": 128,
        "state_size": 8,
        "num_hidden_layers": 4,
        "vocab_size": 512,
    },
    "mamba2": {
        "model_type": "mamba2",
        "hidden_size": 128,
        "state_size": 16,
        "num_hidden_layers": 4,
        "vocab_size": 512,
        "num_heads": 8,
        "head_dim": 32,
        "n_groups": 1,
        "chunk_size": 32,
    },
    "bert": ENCODER | {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
    "roberta": ENCODER | {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]},
    "deberta_v2": ENCODER
    | {
        "model_type": "deberta-v2",
        "architectures": ["DebertaV2ForSequenceClassification"],
        "relative_attention": True,
        "position_buckets": 64,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": -1,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "distilbert": {
        "model_type": "distilbert",
        "dim": 128,
        "hidden_dim": 192,
        "n_layers": 4,
        "n_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "architectures": ["DistilBertForSequenceClassification"],
    },
    "modernbert": ENCODER
    | {
        "model_type": "modernbert",
        "architectures": ["ModernBertForSequenceClassification"],
        "local_attention": 64,
        "global_attn_every_n_layers": 2,
        "pad_token_id": 0,
    },
    "electra": ENCODER
    | {"model_type": "electra", "embedding_size": 64, "architectures": ["ElectraForSequenceClassification"]},
    "t5": T5 | {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
    "flan-t5": T5
    | {
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "architectures": ["T5ForConditionalGeneration"],
    },
    "mt5": T5 | {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]},
    "bart": BART
    | {"model_type": "bart", "max_position_embeddings": 512, "architectures": ["BartForConditionalGeneration"]},
    "whisper": BART
    | {
        "model_type": "whisper",
        "num_mel_bins": 80,
        "max_source_positions": 100,
        "max_target_positions": 256,
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "architectures": ["WhisperForConditionalGeneration"],
    },
    "vit": VISION
    | {"model_type": "vit", "image_size": 64, "patch_size": 16, "architectures": ["ViTForImageClassification"]},
    "gemma3": {
        "model_type": "gemma3",
        "text_config": HEADS | {"model_type": "gemma3_text", "sliding_window": 512},
        "vision_config": VISION | {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 16},
        "mm_tokens_per_image": 4,
        "image_token_index": 500,
        "boi_token_index": 501,
        "eoi_token_index": 502,
        "architectures": ["Gemma3ForConditionalGeneration"],
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "text_config": SMALL
        | {"model_type": "qwen2_vl_text", "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}},
        "vision_config": {
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": 128,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        "image_token_id": 500,
        "vision_start_token_id": 501,
        "vision_end_token_id": 502,
        "video_token_id": 503,
        "architectures": ["Qwen2VLForConditionalGeneration"],
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": SMALL
        | {"model_type": "qwen2_5_vl_text", "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}},
        "vision_config": {
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        "image_token_id": 500,
        "vision_start_token_id": 501,
        "vision_end_token_id": 502,
        "video_token_id": 503,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    },
    "llama4": {
        "model_type": "llama4",
        "text_config": HEADS
        | {
            "model_type": "llama4_text",
            "num_local_experts": 4,
            "intermediate_size_mlp": 192,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
            "no_rope_layers": [1, 1, 1, 0],
        },
        "vision_config": VISION
        | {
            "intermediate_size": 512,
            "image_size": 64,
            "patch_size": 16,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        },
        "image_token_index": 500,
        "image_seq_length": 4,
        "boi_token_index": 501,
        "eoi_token_index": 502,
        "architectures": ["Llama4ForConditionalGeneration"],
    },
    "llava": {
        "model_type": "llava",
        "text_config": SMALL | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 64, "patch_size": 16},
        "image_token_index": 500,
        "image_seq_length": 16,
        "architectures": ["LlavaForConditionalGeneration"],
    },
    "stablelm": SMALL | {"model_type": "stablelm"},
    "starcoder2": SMALL | {"model_type": "starcoder2"},
    "glm4": HEADS | {"model_type": "glm4", "pad_token_id": 0},
    "exaone4": SMALL | {"model_type": "exaone4", "sliding_window": 32, "sliding_window_pattern": 2},
    "nanochat": SMALL | {"model_type": "nanochat"},
    "codegen": {"model_type": "codegen", "n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 512, "rotary_dim": 16},
    "gpt_bigcode": {"model_type": "gpt_bigcode", "n_embd": 128, "n_layer": 4, "n_head": 2, "vocab_size": 512},
    "biogpt": ENCODER | {"model_type": "biogpt"},
    "mbart": BART
    | {"model_type": "mbart", "max_position_embeddings": 512, "architectures": ["MBartForConditionalGeneration"]},
    "albert": ENCODER
    | {"model_type": "albert", "embedding_size": 64, "architectures": ["AlbertForSequenceClassification"]},
    "roformer": ENCODER | {"model_type": "roformer", "architectures": ["RoFormerForSequenceClassification"]},
    "deit": VISION
    | {"model_type": "deit", "image_size": 64, "patch_size": 16, "architectures": ["DeiTForImageClassification"]},
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": HEADS
        | {"model_type": "qwen3_vl_text", "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}},
        "vision_config": {
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
        },
        "image_token_id": 500,
        "vision_start_token_id": 501,
        "vision_end_token_id": 502,
        "video_token_id": 503,
        "architectures": ["Qwen3VLForConditionalGeneration"],
    },
    "idefics3": {
        "model_type": "idefics3",
        "text_config": SMALL | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "idefics3_vision", "image_size": 64, "patch_size": 16},
        "scale_factor": 2,
        "image_token_id": 500,
        "architectures": ["Idefics3ForConditionalGeneration"],
    },
    "smolvlm": {
        "model_type": "smolvlm",
        "text_config": SMALL | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "smolvlm_vision", "image_size": 64, "patch_size": 16},
        "scale_factor": 4,
        "image_token_id": 500,
        "architectures": ["SmolVLMForConditionalGeneration"],
    },
    "internvl": {
        "model_type": "internvl",
        "text_config": SMALL | {"model_type": "qwen2"},
        "vision_config": VISION | {"model_type": "internvl_vision", "image_size": [64, 64], "patch_size": [16, 16]},
        "image_token_id": 500,
        "architectures": ["InternVLForConditionalGeneration"],
    },
    "llava_next": {
        "model_type": "llava_next",
        "text_config": SMALL | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 64, "patch_size": 16},
        "image_grid_pinpoints": [[64, 128], [128, 64], [128, 128]],
        "image_token_index": 500,
        "architectures": ["LlavaNextForConditionalGeneration"],
    },
    "mistral3": {
        "model_type": "mistral3",
        "text_config": HEADS | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 64, "image_size": 256, "patch_size": 14},
        "spatial_merge_size": 2,
        "image_token_index": 500,
        "architectures": ["Mistral3ForConditionalGeneration"],
    },
    "paligemma": {
        "model_type": "paligemma",
        "text_config": HEADS | {"model_type": "gemma"},
        "vision_config": VISION
        | {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 16, "projection_dim": 128},
        "projection_dim": 128,
        "image_seq_length": 16,
        "image_token_index": 500,
        "architectures": ["PaliGemmaForConditionalGeneration"],
    },
}

# Without adapters: PEFT refuses Mamba's projections.
_WITHOUT_LORA = ("mamba", "mamba2", "falcon_mamba", "bamba")
# PEFT puts adapters on all linear layers of these, and then fails: on a router that returns two tensors, on a
# classifier that is trained whole.
_LORA_FAILS = ("phimoe", "llama4_text", "llama4", "distilbert")
# Images of models that take any size; their tokens need longer sequences than the others' cells have.
IMAGE_SIZES = {
    "qwen2_vl": "112x84",
    "qwen2_5_vl": "140x168",
    "qwen3_vl": "256x256",
    "mistral3": "140x168",
    "idefics3": "128x128",
    "smolvlm": "128x128",
    "internvl": "128x128",
    "llava_next": "128x128",
}
# transformers has no other attention for these.
_EAGER_ONLY = (
    "gemma2",
    "gpt_oss",
    "bloom",
    "gpt_neo",
    "gptj",
    "deberta_v2",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "codegen",
    "roformer",
)
# transformers does not checkpoint it: its layers are one layer, run again and again.
_WITHOUT_CHECKPOINTING = ("albert",)
# Their linear attention takes 64 tokens at once, and pads what is no multiple of it.
_CHUNKED_BY_64 = ("qwen3_next", "qwen3_5")
_OPTIMIZERS = ("adamw_torch", "sgd", "adamw_torch_fused")


def architecture_cells() -> Iterator[Cell]:
    """For each architecture a plain step, a mixed one with checkpointing, and one of adapters; between them every
    precision meets every attention, checkpointing and optimizer in some family."""
    for number, (name, config) in enumerate(ARCHITECTURES.items()):
        attention = "eager" if name in _EAGER_ONLY or number % 3 == 0 else "sdpa"
        optimizer = _OPTIMIZERS[number % len(_OPTIMIZERS)]
        images = {"images": "vision_config" in config, "image_size": IMAGE_SIZES.get(name, "")}
        short, middle, long = (384, 448, 512) if name in _CHUNKED_BY_64 else (64, 96, 160)
        if name in IMAGE_SIZES:
            short = 128
        yield Cell(
            name=f"arch-{name}-fp32",
            config=config,
            attention=attention,
            optimizer=optimizer,
            seq_len=short,
            **images,
        )
        yield Cell(
            name=f"arch-{name}-{('bf16', 'bf16-params')[number % 2]}-checkpointing",
            config=config,
            attention=attention,
            precision=("bf16", "bf16-params")[number % 2],
            checkpointing="none" if name in _WITHOUT_CHECKPOINTING else "full",
            seq_len=middle,
            **images,
        )
        if name not in (*_WITHOUT_LORA, *_LORA_FAILS):
            yield Cell(
                name=f"arch-{name}-lora", config=config, attention=attention, method="lora", seq_len=long, **images
            )
