"""A config.json from a stranger ends in a dictionary or in one line that names the field and its value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launchkit.errors import ModelConfigError, UnknownModelError
from launchkit.hub.validate import MAX_CONFIG_BYTES, parse_config, read_config_file, validate_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}

VALID = {
    "llama": {},
    "unknown fields": {"some_new_switch": {"deep": [1, 2]}, "factor": 1.5},
    "no KV heads": {"num_key_value_heads": None},
    "no head size": {"head_dim": None},
    "its own head size": {"hidden_size": 577, "head_dim": 64},
    "a type with a default head size": {"model_type": "gemma3_text", "hidden_size": 577},
    "a width per layer": {"intermediate_size": [1536] * 30},
    "layers without attention": {"num_attention_heads": [9, 0, 9]},
    "no experts": {"num_local_experts": 0},
    "no architectures": {"architectures": None},
    "a nested configuration": {"vision_config": {"model_type": "siglip", "hidden_size": 1152}},
}

INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "text for a width": ({"hidden_size": "576"}, 'hidden_size is "576", not a whole number'),
    "a fraction": ({"hidden_size": 576.5}, "hidden_size is 576.5, not a whole number"),
    "a whole fraction": ({"num_hidden_layers": 30.0}, "num_hidden_layers is 30.0, not a whole number"),
    "true": ({"num_hidden_layers": True}, "num_hidden_layers is true, not a whole number"),
    "null": ({"hidden_size": None}, "hidden_size is null, not a whole number"),
    "a list": ({"vocab_size": [1, 2]}, r"vocab_size is \[1, 2\], not a whole number"),
    "an object": ({"vocab_size": {"a": 1}}, r'vocab_size is \{"a": 1\}, not a whole number'),
    "negative heads": ({"num_attention_heads": -9}, "num_attention_heads is -9, not between 1 and 65536"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0, not between 1 and 65536"),
    "a trillion layers": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, not between 1 and 10000"),
    "a huge number": ({"vocab_size": 10**100}, r"vocab_size is 1000.* …, not between 1 and 100000000"),
    "no width": ({"hidden_size": 0}, "hidden_size is 0, not between 1 and 1048576"),
    "a bad layer": ({"intermediate_size": [1536, -1]}, "intermediate_size is -1, not between 0"),
    "indivisible width": ({"hidden_size": 577}, "hidden_size 577 is no multiple of num_attention_heads 9"),
    "indivisible heads": ({"num_key_value_heads": 2}, "num_attention_heads 9 is no multiple of num_key_value_heads 2"),
    "more KV heads": ({"num_key_value_heads": 18}, "num_attention_heads 9 is no multiple of num_key_value_heads 18"),
    "NaN": ({"rope_theta": float("nan")}, "rope_theta is nan, not a finite number"),
    "infinity": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, not a finite number"),
    "a number as type": ({"model_type": 7}, "model_type is 7, not a name like llama"),
    "an empty type": ({"model_type": ""}, 'model_type is "", not a name like llama'),
    "a class as text": ({"architectures": "LlamaForCausalLM"}, 'architectures is "LlamaForCausalLM", not a list'),
    "numbers as classes": ({"architectures": [1]}, r"architectures is \[1\], not a list of class names"),
    "nested": ({"text_config": {"hidden_size": "x"}}, 'text_config.hidden_size is "x", not a whole number'),
    "nested twice": (
        {"thinker_config": {"text_config": {"num_attention_heads": -1}}},
        "thinker_config.text_config.num_attention_heads is -1",
    ),
}

NOT_A_CONFIG = {
    "empty": (b"", r"is not JSON \(Expecting value at line 1 column 1\)"),
    "cut": (b'{"model_type": "llama"', "is not JSON .* line 1"),
    "binary": (b"\xff\xfe\x00", "is not UTF-8 text"),
    "a list": (b"[1]", "holds a list, not an object"),
    "text": (b'"llama"', "holds a string, not an object"),
    "null": (b"null", "holds null, not an object"),
    "a number": (b"3", "holds a number, not an object"),
    "no type": (b"{}", "has no model_type"),
    "nested": (b'{"model_type":"llama","a":' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper than 32"),
    "nested a thousand times": (b"[" * 100_000, "nested too deep"),
    "a number of many digits": (b'{"model_type":"llama","vocab_size":' + b"9" * 5000 + b"}", "thousands of digits"),
    "NaN": (b'{"model_type":"llama","hidden_size":NaN}', "hidden_size is nan"),
}


@pytest.mark.parametrize("change", VALID.values(), ids=VALID.keys())
def test_valid_configurations_pass(change: dict[str, Any]) -> None:
    validate_config(LLAMA | change, where="config.json")


@pytest.mark.parametrize(("change", "message"), INVALID.values(), ids=INVALID.keys())
def test_invalid_fields_are_named_with_their_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=rf"^config\.json: {message}.*; correct the file") as caught:
        validate_config(LLAMA | change, where="config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("data", "message"), NOT_A_CONFIG.values(), ids=NOT_A_CONFIG.keys())
def test_what_is_no_configuration_is_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(ModelConfigError, match=rf"^the file.* {message}") as caught:
        parse_config(data, where="the file")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_byte_order_mark_is_no_obstacle() -> None:
    assert parse_config(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode(), where="config.json") == LLAMA


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    assert read_config_file(file) == LLAMA


def test_a_gigabyte_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as handle:
        handle.truncate(2**30)  # sparse: takes no room, but would take seconds to read
    with pytest.raises(ModelConfigError, match=f"1073741824 bytes long, a config.json has at most {MAX_CONFIG_BYTES}"):
        read_config_file(file)


def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(ModelConfigError, match="bytes long"):
        read_config_file(Path("/dev/zero"))


def test_an_absent_file_is_an_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="No such file"):
        read_config_file(tmp_path / "config.json")
