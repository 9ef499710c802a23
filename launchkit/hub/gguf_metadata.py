"""The configuration behind a GGUF file: its metadata in Hugging Face's names.

Only metadata and tensor names are read. A GGUF file is a model to run, not to train: what is planned is the training
of the Hugging Face model of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from launchkit.errors import MissingExtraError, ModelConfigError

# GGUF's keys (without the architecture's prefix) in the names of most configuration classes. Source: the table in
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and transformers' own GGUF loader.
COMMON_FIELDS: dict[str, str] = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_KEY_LENGTH = {"attention.key_length": "head_dim"}
_SLIDING_WINDOW = {"attention.sliding_window": "sliding_window"}
_EXPERTS = {"expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}
_GPT2_FIELDS = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}


class Architecture(NamedTuple):
    """One row of the table: Hugging Face's names for what GGUF calls by one architecture."""

    model_type: str
    class_name: str
    fields: Mapping[str, str]
    constants: Mapping[str, Any] = {}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", COMMON_FIELDS),
    "mixtral": Architecture(  # written as "llama" with experts
        "mixtral",
        "MixtralForCausalLM",
        COMMON_FIELDS | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", COMMON_FIELDS),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", COMMON_FIELDS | _KEY_LENGTH),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", COMMON_FIELDS | _KEY_LENGTH | _EXPERTS | {"expert_count": "num_experts"}
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", COMMON_FIELDS | _KEY_LENGTH),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        COMMON_FIELDS
        | _KEY_LENGTH
        | _SLIDING_WINDOW
        | {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", COMMON_FIELDS | _KEY_LENGTH | _SLIDING_WINDOW, {"sliding_window_pattern": 6}
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", COMMON_FIELDS | _SLIDING_WINDOW),
    "gpt2": Architecture("gpt2", "GPT2LMHeadModel", _GPT2_FIELDS),
    "falcon": Architecture(
        "falcon", "FalconForCausalLM", COMMON_FIELDS | {"attention.layer_norm_epsilon": "layer_norm_epsilon"}
    ),
    "starcoder2": Architecture(
        "starcoder2", "Starcoder2ForCausalLM", COMMON_FIELDS | {"attention.layer_norm_epsilon": "norm_epsilon"}
    ),
}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class GgufContents(NamedTuple):
    """What is read from a file: scalar metadata, and each tensor's name with its shape, fastest dimension first."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]


def read_gguf_config(path: Path, *, read: Callable[[Path], GgufContents] | None = None) -> dict[str, Any]:
    """The configuration of the Hugging Face model that ``path`` was converted from."""
    return config_from_gguf((read or read_contents)(path), where=str(path))


def config_from_gguf(contents: GgufContents, *, where: str) -> dict[str, Any]:
    """Translate metadata. What GGUF leaves out (vocabulary size, tied head, projection biases) is read off tensors."""
    metadata, tensors = contents
    name = str(metadata.get("general.architecture", ""))
    row_name = "mixtral" if name == "llama" and metadata.get("llama.expert_count") else name
    row = ARCHITECTURES.get(row_name)
    if row is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelConfigError(
            f"{where} holds architecture {name!r}, known from GGUF are {known}; pass --config FILE with its config.json"
        )
    config: dict[str, Any] = {"architectures": [row.class_name], "model_type": row.model_type, **row.constants}
    for key, field in row.fields.items():
        value = metadata.get(f"{name}.{key}")
        if value is not None:
            config[field] = value
    embedding = tensors.get("token_embd.weight")
    if embedding is not None:
        config["vocab_size"] = embedding[-1]  # padded, as in the model
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if "rope_freqs.weight" in tensors:  # how GGUF stores Llama 3.1's scaling; its factors do not matter to a plan
        config["rope_scaling"] = LLAMA3_ROPE
    if row.model_type == "llama" and "blk.0.attn_q.bias" in tensors:
        config["attention_bias"] = True
    return config


def read_contents(path: Path) -> GgufContents:
    """Read a file's metadata and tensor table with the ``gguf`` package, without its tokenizer."""
    try:
        from gguf import GGUFReader  # lazy: an optional dependency, and it imports numpy
    except ImportError as error:
        raise MissingExtraError(
            f"{path.name} is a GGUF file and the gguf package is not installed; pip install gguf, or pass --config FILE"
        ) from error
    try:
        reader = GGUFReader(path)
        metadata = {
            key: field.contents() for key, field in reader.fields.items() if not key.startswith(("tokenizer.", "GGUF."))
        }
        tensors = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError, TypeError, MemoryError, OverflowError) as error:
        raise ModelConfigError(
            f"{path} cannot be read as GGUF ({type(error).__name__}); download it again, or pass --config FILE"
        ) from error
    return GgufContents(metadata, tensors)
