"""The fingerprint is equal for configurations that train alike, and different for all others."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from launchkit.catalog.fingerprint import CLASS_DEFAULTS, DROPPED_FIELDS, canonical, fingerprint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}

# Each of these says the same as LLAMA.
SAME = {
    "another name": {"_name_or_path": "unsloth/Llama-3.2-1B"},
    "another version": {"transformers_version": "4.43.0"},
    "older dtype": {"torch_dtype": "bfloat16"},
    "newer dtype": {"dtype": "float16"},
    "token ids": {"pad_token_id": 128004, "eos_token_id": [1, 2], "image_token_index": 7},
    "cache": {"use_cache": False},
    "initialisation": {"initializer_range": 0.5},
    "epsilon": {"rms_norm_eps": 1e-5},
    "class defaults": {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "hidden_act": "silu"},
    "derived head size": {"head_dim": 64},
    "no scaling": {"rope_scaling": None},
    "newer rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "static scaling": {"rope_scaling": {"type": "linear", "factor": 8.0}},
    "llama 3 scaling": {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0}},
    "more rotary positions": {"max_position_embeddings": 131072},
    "two labels": {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
}

# Each of these is another model.
OTHER = {
    "width": {"hidden_size": 4096},
    "depth": {"num_hidden_layers": 17},
    "KV heads": {"num_key_value_heads": 32},
    "head size": {"head_dim": 128},
    "vocabulary": {"vocab_size": 128257},
    "tie": {"tie_word_embeddings": False},
    "bias": {"attention_bias": True},
    "dropout": {"attention_dropout": 0.1},
    "class": {"architectures": ["LlamaForSequenceClassification"]},
    "labels": {"id2label": {"0": "a", "1": "b", "2": "c"}},
    "dynamic scaling": {"rope_scaling": {"type": "dynamic", "factor": 8.0}},
    "partial rotation": {"partial_rotary_factor": 0.5},
    "quantised": {"quantization_config": {"quant_method": "fp8"}},
    "unknown field": {"some_new_switch": 0},
    "zero is not false": {"attention_bias": 0},
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_dropped_fields_do_not_change_it(change: dict[str, Any]) -> None:
    assert fingerprint(LLAMA | change) == fingerprint(LLAMA)


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER.keys())
def test_kept_fields_change_it(change: dict[str, Any]) -> None:
    assert fingerprint(LLAMA | change) != fingerprint(LLAMA)


def test_others_differ_from_each_other() -> None:
    assert len({fingerprint(LLAMA | change) for change in OTHER.values()}) == len(OTHER)


def test_order_of_fields_does_not_matter() -> None:
    assert fingerprint(dict(reversed(LLAMA.items()))) == fingerprint(LLAMA)


def test_it_is_stable_across_releases() -> None:
    """File names in profiles/models/programs depend on it: a change here means building the catalogue anew."""
    assert fingerprint(LLAMA) == "747edae3cfb75b93"


def test_learned_positions_are_parameters() -> None:
    bert = {"model_type": "bert", "max_position_embeddings": 512}
    assert fingerprint(bert) != fingerprint(bert | {"max_position_embeddings": 1024})


def test_longrope_keeps_its_original_length() -> None:
    rope = {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0], "original_max_position_embeddings": 4096}
    phi = {"model_type": "phi3", "rope_scaling": rope}
    assert fingerprint(phi) == fingerprint(phi | {"rope_scaling": rope | {"long_factor": [2.0]}})
    longer = rope | {"original_max_position_embeddings": 8192}
    assert fingerprint(phi) != fingerprint(phi | {"rope_scaling": longer})


def test_partial_rotation_is_one_field_in_both_spellings() -> None:
    older = {"model_type": "phi", "partial_rotary_factor": 0.4, "rope_theta": 1e4}
    newer = {"model_type": "phi", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4}}
    assert fingerprint(older) == fingerprint(newer)


def test_an_unused_window_says_nothing() -> None:
    qwen = {"model_type": "qwen2", "num_hidden_layers": 2}
    unused = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
    spelled_out = {"layer_types": ["full_attention"] * 2, "sliding_window": None}
    assert fingerprint(qwen) == fingerprint(qwen | unused) == fingerprint(qwen | spelled_out)
    assert fingerprint(qwen) != fingerprint(qwen | unused | {"use_sliding_window": True})
    assert fingerprint(qwen) != fingerprint(qwen | {"layer_types": ["full_attention", "sliding_attention"]})


def test_nested_configurations_are_canonical_too() -> None:
    nested = {"model_type": "gemma3", "text_config": LLAMA}
    assert fingerprint(nested) == fingerprint(nested | {"text_config": LLAMA | {"torch_dtype": "float16"}})
    assert fingerprint(nested) != fingerprint(nested | {"text_config": LLAMA | {"vocab_size": 1}})


def test_no_field_is_both_dropped_and_a_default() -> None:
    assert not [name for defaults in CLASS_DEFAULTS.values() for name in defaults if name in DROPPED_FIELDS]


def test_canonical_leaves_its_argument_alone() -> None:
    config = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    before = repr(config)
    canonical(config)
    assert repr(config) == before


@pytest.mark.real_loader
@pytest.mark.skipif(find_spec("transformers") is None, reason="compares with transformers' own classes")
def test_class_defaults_are_those_of_transformers() -> None:
    """In a process of its own, since importing transformers here would hide imports elsewhere."""
    program = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from launchkit.catalog.fingerprint import CLASS_DEFAULTS
missing = object()
for model_type, defaults in CLASS_DEFAULTS.items():
    actual = CONFIG_MAPPING[model_type]().to_dict()
    wrong = {k: actual.get(k, missing) for k, v in defaults.items() if actual.get(k, missing) not in (v, v or None)}
    assert not wrong, (model_type, wrong)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
