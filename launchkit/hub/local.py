"""A model on this disk: a directory, a ``config.json`` or a GGUF file. Nothing in it is executed or unpickled."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchkit.errors import ModelConfigError, UnknownModelError
from launchkit.hub.gguf_metadata import read_gguf_config
from launchkit.hub.safetensors import StoredWeights, read_stored_weights
from launchkit.hub.validate import read_config_file, validate_config

LOCAL_PREFIXES = ("./", "../", "/", "~", ".\\", "..\\")
MAX_SUGGESTIONS = 3
MAX_LISTED = 1000  # entries of a directory that are looked at for what was meant
LOCAL_SUFFIXES = (".json", ".gguf", ".safetensors", ".bin")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """What was found: the configuration, and the weights beside it where their headers could be read."""

    config: dict[str, Any]
    stored: StoredWeights | None = None


def is_local(name: str) -> bool:
    """Whether ``name`` means something on this disk: it is spelled like a path, or a directory of that name holds a
    model. The latter is what ``from_pretrained`` does, so that plan and launch mean the same model."""
    if name in (".", "..") or name.startswith(LOCAL_PREFIXES) or name.endswith(LOCAL_SUFFIXES):
        return True
    return _holds_model(name)  # os.path, unlike pathlib, answers False to a name that no path can have


def read_local(name: str | Path) -> ModelFiles:
    """The model in the directory or file ``name``."""
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return _read_directory(path)
    if not os.path.exists(path):
        near = similar_models(str(name))
        advice = f"did you mean {' or '.join(near)}?" if near else "check the path, or give a hub id like Qwen/Qwen3-8B"
        raise UnknownModelError(f"{name} does not exist; {advice}")
    if path.suffix == ".gguf":
        return _read_gguf(path)
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise UnknownModelError(f"{name} is a weight file; pass its directory, {path.parent}")
    return ModelFiles(config=read_config_file(path))


def _read_directory(directory: Path) -> ModelFiles:
    config = directory / "config.json"
    if config.is_file():
        return ModelFiles(config=read_config_file(config), stored=read_stored_weights(directory))
    gguf = gguf_in(directory)
    if gguf is not None:
        return _read_gguf(gguf)
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        raise UnknownModelError(f"{directory} holds an adapter, not a model; plan its base model{_base_of(adapter)}")
    near = similar_models(str(directory)) or _models_in(str(directory))[:MAX_SUGGESTIONS]
    advice = f"did you mean {' or '.join(near)}?" if near else "pass a model's directory, or --config FILE"
    raise UnknownModelError(f"{directory} holds no config.json; {advice}")


def similar_models(name: str) -> list[str]:
    """Models beside the path ``name`` whose names look like its last part, as they would be typed."""
    import difflib  # lazy: needed only on the way to an error

    parent, last = os.path.split(name.rstrip("/\\"))
    models = {os.path.basename(path): path for path in _models_in(parent) if path != name.rstrip("/\\")}
    return [models[near] for near in difflib.get_close_matches(last, models, n=MAX_SUGGESTIONS)]


def _models_in(directory: str) -> list[str]:
    """The directories in ``directory`` that hold a model, in the order of their names, and GGUF files."""
    try:
        names = sorted(os.listdir(os.path.expanduser(directory) or "."))[:MAX_LISTED]
    except OSError:
        return []
    paths = [os.path.join(directory, name) for name in names]
    return [path for path in paths if path.endswith(".gguf") or _holds_model(os.path.expanduser(path))]


def _holds_model(path: str) -> bool:
    """Whether a directory would be read as a model."""
    return os.path.isfile(os.path.join(path, "config.json")) or (
        os.path.isdir(path) and gguf_in(Path(path)) is not None
    )


def gguf_in(directory: Path) -> Path | None:
    """The first GGUF file of ``directory``: the first part of a split one, the first name of several."""
    return min(directory.glob("*.gguf"), default=None)


def _read_gguf(path: Path) -> ModelFiles:
    config = read_gguf_config(path)
    validate_config(config, where=str(path))
    return ModelFiles(config=config)


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads(adapter.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise ModelConfigError(f"{adapter} is not JSON; pass the directory of the base model") from None
    return f", {base}" if isinstance(base, str) and base.isprintable() else ""
