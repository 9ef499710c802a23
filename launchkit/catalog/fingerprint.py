"""A name for an architecture: equal for configurations that train alike, different for all others.

Two hub ids whose ``config.json`` differ only in names, versions, token ids and other fields that no allocation
depends on share one traced program. A field that this module does not know is kept: an unnecessary trace costs
seconds, a wrong program costs trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# The fields that are dropped, by the reason why nothing in a training step depends on them.
DROPPED_BECAUSE: Mapping[str, str] = {
    "names, versions, bookkeeping": "_name_or_path name_or_path _commit_hash transformers_version tokenizer_class "
    "prefix auto_map finetuning_task unsloth_version unsloth_fixed _attn_implementation_autoset is_llama_config",
    "how weights are stored or initialised: what is trained decides the dtype in force": "torch_dtype dtype "
    "initializer_range initializer_factor initializer_std init_std rescale_prenorm_residual",
    "inference only: the cache is off in a training step whatever the file says": "use_cache cache_implementation "
    "output_past return_dict return_dict_in_generate output_attentions output_hidden_states output_scores "
    "task_specific_params max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "num_return_sequences temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size diversity_penalty bad_words_ids forced_bos_token_id forced_eos_token_id "
    "forced_decoder_ids suppress_tokens begin_suppress_tokens exponential_decay_length_penalty remove_invalid_values",
    "numbers inside element-wise arithmetic: they change values, never shapes or saved tensors": "rms_norm_eps "
    "layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps rope_theta rope_local_base_freq rotary_emb_base "
    "router_aux_loss_coef",
    "withdrawn features that transformers 5 ignores": "pretraining_tp rope_interleaved gradient_checkpointing label2id "
    "n_special predict_special_tokens n_ctx",
}
DROPPED_FIELDS = frozenset(name for names in DROPPED_BECAUSE.values() for name in names.split())
DROPPED_SUFFIXES = ("_token_id", "_token_index")

# Spellings of one field: the newer one is kept. Source: transformers 5, PretrainedConfig.__post_init__ and
# modeling_rope_utils.RotaryEmbeddingConfigMixin.convert_rope_params_to_dict.
RENAMED_FIELDS = {"rope_scaling": "rope_parameters"}
RENAMED_ROPE_FIELDS = {"type": "rope_type"}

# What of a rotary embedding decides the graph. The static kinds compute their frequencies once, when the model is
# built, so the kind and its factors only change values; the others recompute them from the length at hand.
STATIC_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
DYNAMIC_ROPE_TYPES = frozenset({"dynamic", "longrope", "su"})
STATIC_ROPE_FIELDS = frozenset({"partial_rotary_factor", "mrope_section", "mrope_interleaved"})
DYNAMIC_ROPE_FIELDS = STATIC_ROPE_FIELDS | {"rope_type", "factor", "original_max_position_embeddings"}

# Any of these marks positions as rotary: then no tensor has max_position_embeddings rows.
ROTARY_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "rotary_pct", "rotary_emb_base"})
DEFAULT_NUM_LABELS = 2  # PretrainedConfig's own default, so a file that spells it out says nothing

# Fields whose value is the class's own default say nothing: hub files leave them out, saved ones spell them out.
# Source: the configuration classes of transformers 5 (a test compares).
_DENSE = {"attention_dropout": 0.0, "hidden_act": "silu", "tie_word_embeddings": False}
_GEMMA = {"attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True}
_ROUTED = {"output_router_logits": False}
CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _DENSE | {"attention_bias": False, "mlp_bias": False},
    "mistral": _DENSE,
    "mixtral": _DENSE | _ROUTED | {"router_jitter_noise": 0.0, "sliding_window": None},
    "qwen2": _DENSE | {"use_sliding_window": False},
    "qwen3": _DENSE | {"use_sliding_window": False, "attention_bias": False},
    "qwen3_moe": _DENSE
    | _ROUTED
    | {"use_sliding_window": False, "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma": _GEMMA | {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": _GEMMA | {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": _GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "phi3": _DENSE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
}

# In these the window and what derives from it count only under use_sliding_window.
WINDOW_ON_DEMAND = frozenset({"qwen2", "qwen3", "qwen3_moe"})
WINDOW_FIELDS = frozenset({"sliding_window", "max_window_layers", "layer_types"})
# In these head_dim is hidden_size / num_attention_heads, and as many KV heads as heads, unless the file says otherwise.
DERIVED_HEADS = frozenset({"llama", "qwen2", "mixtral", "phi3"})


def fingerprint(config: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that name the architecture of a ``config.json``.

    Formula: the first 64 bits of SHA-256 over the canonical fields as sorted, compact JSON.
    """
    text = json.dumps(canonical(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide parameters and step, in one spelling; nested configurations likewise."""
    fields: dict[str, Any] = {}
    implied = _implied(config)
    rotary = bool(ROTARY_FIELDS & config.keys())
    for key, value in config.items():
        name = RENAMED_FIELDS.get(key, key)
        if name in DROPPED_FIELDS or name.endswith(DROPPED_SUFFIXES):
            continue
        if name in implied and _same(value, implied[name]):
            continue
        if name == "rope_parameters":
            fields |= _rope_fields(value)
        elif name in ("id2label", "num_labels"):
            fields |= _label_fields(value)
        elif rotary and name == "max_position_embeddings" and not _is_dynamic(config):
            continue
        elif isinstance(value, Mapping) and name.endswith("_config"):
            fields[name] = canonical(value)
        else:
            fields[name] = value
    return fields


def _implied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that fields of this configuration have when it does not name them."""
    model_type = config.get("model_type")
    implied = dict(CLASS_DEFAULTS.get(model_type, {})) if isinstance(model_type, str) else {}
    if model_type in WINDOW_ON_DEMAND and not config.get("use_sliding_window"):
        implied |= {name: config[name] for name in WINDOW_FIELDS & config.keys() if not _is_windowed(config[name])}
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if model_type in DERIVED_HEADS and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        implied |= {"head_dim": width // heads, "num_key_value_heads": heads}
    return implied


def _is_windowed(value: Any) -> bool:
    """Whether ``layer_types`` names any kind of layer but full attention."""
    return isinstance(value, list) and any(kind != "full_attention" for kind in value)


def _same(value: Any, other: Any) -> bool:
    """Equality as JSON has it: ``false`` is not ``0``, but ``0`` is ``0.0``."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _is_dynamic(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    return isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in DYNAMIC_ROPE_TYPES


def _rope_fields(rope: Any) -> dict[str, Any]:
    """What is kept of ``rope_scaling``/``rope_parameters``: often nothing, else one field."""
    if not isinstance(rope, Mapping):
        return {} if rope is None else {"rope_parameters": rope}
    if any(isinstance(value, Mapping) for value in rope.values()):  # one set per layer type
        per_type = {key: fields for key, value in rope.items() if (fields := _rope_fields(value))}
        return {"rope_parameters": per_type} if per_type else {}
    named = {RENAMED_ROPE_FIELDS.get(key, key): value for key, value in rope.items()}
    static = named.get("rope_type", "default") in STATIC_ROPE_TYPES
    kept = STATIC_ROPE_FIELDS if static else DYNAMIC_ROPE_FIELDS
    fields = {key: value for key, value in named.items() if key in kept}
    # A partial factor stands at the top in older files and inside the rope in newer ones.
    partial = (
        {"partial_rotary_factor": fields.pop("partial_rotary_factor")} if "partial_rotary_factor" in fields else {}
    )
    return partial | ({"rope_parameters": fields} if fields else {})


def _label_fields(labels: Any) -> dict[str, Any]:
    count = len(labels) if isinstance(labels, Mapping) else labels
    return {} if count in (None, DEFAULT_NUM_LABELS) else {"num_labels": count}
