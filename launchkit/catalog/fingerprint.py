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

DROPPED_FIELDS = frozenset(
    # Names, versions and bookkeeping.
    "_name_or_path name_or_path _commit_hash transformers_version tokenizer_class prefix auto_map finetuning_task "
    "unsloth_version unsloth_fixed _attn_implementation_autoset is_llama_config "
    # How weights are stored or initialised; what is trained decides the dtype in force.
    "torch_dtype dtype initializer_range initializer_factor initializer_std init_std rescale_prenorm_residual "
    # Inference only. use_cache is off in a training step whatever the file says.
    "use_cache cache_implementation output_past return_dict return_dict_in_generate output_attentions "
    "output_hidden_states output_scores task_specific_params max_length min_length do_sample early_stopping "
    "num_beams num_beam_groups num_return_sequences temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size diversity_penalty bad_words_ids "
    "forced_bos_token_id forced_eos_token_id forced_decoder_ids suppress_tokens begin_suppress_tokens "
    "exponential_decay_length_penalty remove_invalid_values "
    # Numbers inside element-wise arithmetic: they change values, never shapes or saved tensors.
    "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps rope_theta rope_local_base_freq "
    "rotary_emb_base router_aux_loss_coef "
    # Fields of withdrawn features that transformers 5 ignores.
    "pretraining_tp gradient_checkpointing label2id n_special predict_special_tokens n_ctx".split()
)
DROPPED_SUFFIXES = ("_token_id", "_token_index")

# Spellings of one field: the newer one is kept. Source: transformers 5, PretrainedConfig.__post_init__ and
# modeling_rope_utils.RotaryEmbeddingConfigMixin.convert_rope_params_to_dict.
RENAMED_FIELDS = {"rope_scaling": "rope_parameters"}
RENAMED_ROPE_FIELDS = {"type": "rope_type"}

# What of a rotary embedding decides the graph; factors and bases only change values. A dynamic kind recomputes
# frequencies beyond its original length, so that length stays.
KEPT_ROPE_FIELDS = frozenset({"rope_type", "partial_rotary_factor", "mrope_section", "mrope_interleaved"})
KEPT_DYNAMIC_ROPE_FIELDS = KEPT_ROPE_FIELDS | {"factor", "original_max_position_embeddings"}
DYNAMIC_ROPE_TYPES = frozenset({"dynamic", "longrope", "su"})

# Any of these marks positions as rotary: then no tensor has max_position_embeddings rows.
ROTARY_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "rotary_pct", "rotary_emb_base"})
DEFAULT_NUM_LABELS = 2  # PretrainedConfig's own default, so a file that spells it out says nothing


def fingerprint(config: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that name the architecture of a ``config.json``.

    Formula: the first 64 bits of SHA-256 over the canonical fields as sorted, compact JSON.
    """
    text = json.dumps(canonical(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide parameters and step, in one spelling; nested configurations likewise."""
    fields: dict[str, Any] = {}
    rotary = bool(ROTARY_FIELDS & config.keys())
    for key, value in config.items():
        name = RENAMED_FIELDS.get(key, key)
        if name in DROPPED_FIELDS or name.endswith(DROPPED_SUFFIXES):
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


def _rope(config: Mapping[str, Any]) -> Any:
    return config.get("rope_parameters") or config.get("rope_scaling")


def _is_dynamic(config: Mapping[str, Any]) -> bool:
    rope = _rope(config)
    return isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in DYNAMIC_ROPE_TYPES


def _rope_fields(rope: Any) -> dict[str, Any]:
    """What is kept of ``rope_scaling``/``rope_parameters``: nothing for the default kind, else a field."""
    if not isinstance(rope, Mapping):
        return {} if rope is None else {"rope_parameters": rope}
    if any(isinstance(value, Mapping) for value in rope.values()):  # one set per layer type
        per_type = {key: _rope_fields(value) for key, value in rope.items()}
        return {"rope_parameters": per_type} if any(per_type.values()) else {}
    named = {RENAMED_ROPE_FIELDS.get(key, key): value for key, value in rope.items()}
    kept = KEPT_DYNAMIC_ROPE_FIELDS if named.get("rope_type") in DYNAMIC_ROPE_TYPES else KEPT_ROPE_FIELDS
    fields = {key: value for key, value in named.items() if key in kept}
    # A partial factor stands at the top in older files and inside the rope in newer ones.
    partial = {"partial_rotary_factor": fields.pop("partial_rotary_factor")} if "partial_rotary_factor" in fields else {}
    return partial | ({} if fields in ({}, {"rope_type": "default"}) else {"rope_parameters": fields})


def _label_fields(labels: Any) -> dict[str, Any]:
    count = len(labels) if isinstance(labels, Mapping) else labels
    return {} if count in (None, DEFAULT_NUM_LABELS) else {"num_labels": count}
