"""From bytes to a model configuration that can be trusted to be one.

A ``config.json`` is data from strangers: it may be no JSON, a gigabyte long, nested a thousand deep, or describe a
model of a trillion layers. Everything here ends in a plain dictionary or in one ``ModelConfigError`` line that names
the file, the field and its value. Fields that are not in the tables pass: new architectures bring new ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from launchkit.errors import ModelConfigError, UnknownModelError

MAX_CONFIG_BYTES = 4 * 1024**2  # the longest real ones (with id2label of 21k classes) are below 2 MiB
MAX_NESTING = 32
REMEDY = "correct the file, or pass --config FILE"


class Bound(NamedTuple):
    """The whole numbers that a field may hold. ``per_layer`` fields may be lists of them, one per layer."""

    minimum: int
    maximum: int
    per_layer: bool = False


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WIDTH = Bound(1, 2**20)
_DEPTH = Bound(1, 10_000)
_HEADS = Bound(1, 2**16, per_layer=True)
_EXPERTS = Bound(0, 2**16)

# Maxima are far above any model (in 2026: 126 layers, width 18 432, vocabulary 262 400), and low enough that no
# later product of them overflows a sensible memory size.
BOUNDS: Mapping[str, Bound] = {
    "hidden_size": _WIDTH,
    "n_embd": _WIDTH,
    "n_embed": _WIDTH,
    "d_model": _WIDTH,
    "dim": _WIDTH,
    "head_dim": Bound(1, 2**16),
    "d_kv": Bound(1, 2**16),
    "intermediate_size": Bound(1, 2**24, per_layer=True),
    "moe_intermediate_size": Bound(1, 2**24, per_layer=True),
    "d_ff": Bound(1, 2**24),
    "ffn_dim": Bound(1, 2**24),
    "num_hidden_layers": _DEPTH,
    "n_layer": _DEPTH,
    "n_layers": _DEPTH,
    "num_layers": _DEPTH,
    "num_decoder_layers": _DEPTH,
    "encoder_layers": _DEPTH,
    "decoder_layers": _DEPTH,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "num_kv_heads": _HEADS,
    "n_head": _HEADS,
    "n_heads": _HEADS,
    "num_heads": _HEADS,
    "vocab_size": Bound(1, 10**8),
    "max_position_embeddings": Bound(1, 2**32),
    "n_positions": Bound(1, 2**32),
    "num_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "num_experts_per_tok": _EXPERTS,
}
OPTIONAL_FIELDS = _words(  # null is allowed: the class computes them
    "head_dim num_key_value_heads num_kv_heads num_experts num_local_experts n_routed_experts num_experts_per_tok "
    "moe_intermediate_size num_decoder_layers max_position_embeddings intermediate_size"
)
WIDTH_NAMES = ("hidden_size", "n_embd", "n_embed", "d_model", "dim")
HEAD_COUNT_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads")

# Architectures whose head size is hidden_size / num_attention_heads when the file gives none. Others have a default
# of their own (Gemma, Qwen3, T5). Source: the configuration classes of transformers 5.
DERIVED_HEAD_SIZE = _words(
    "llama mistral mixtral qwen2 qwen2_moe phi phi3 phimoe gpt2 gpt_neo gpt_neox gptj opt bloom falcon bert roberta "
    "xlm-roberta distilbert deberta deberta-v2 electra olmo olmo2 olmoe smollm3 stablelm starcoder2 cohere cohere2 "
    "granite granitemoe whisper vit bart mbart"
)


def read_config_file(path: Path) -> dict[str, Any]:
    """The validated configuration in the file ``path``. Its size is looked at before it is read."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_CONFIG_BYTES:
            raise too_large(str(path), num_bytes)
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)  # a pipe or a growing file has no size to look at
    except OSError as error:
        raise UnknownModelError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise too_large(str(path), len(data))
    return parse_config(data, where=str(path))


def too_large(where: str, num_bytes: int) -> ModelConfigError:
    """The refusal of a file that is too long to be a configuration."""
    return ModelConfigError(
        f"{where} is {num_bytes} bytes long, a config.json has at most {MAX_CONFIG_BYTES}; pass the configuration, "
        "not the weights"
    )


def parse_config(data: bytes, *, where: str) -> dict[str, Any]:
    """The validated configuration in the JSON text ``data``; ``where`` names it in errors."""
    try:
        config = json.loads(data.decode("utf-8-sig"))  # NaN and Infinity parse, and are refused as values below
    except UnicodeDecodeError as error:
        raise ModelConfigError(f"{where} is not UTF-8 text (byte {error.start}); {REMEDY}") from error
    except json.JSONDecodeError as error:
        raise ModelConfigError(
            f"{where} is not JSON ({error.msg} at line {error.lineno} column {error.colno}); {REMEDY}"
        ) from error
    except RecursionError as error:
        raise ModelConfigError(f"{where} is nested too deep to be a model configuration; {REMEDY}") from error
    except ValueError as error:  # Python refuses to convert more than 4300 digits
        raise ModelConfigError(f"{where} holds a number of thousands of digits; {REMEDY}") from error
    if not isinstance(config, dict):
        raise ModelConfigError(f"{where} holds {_kind(config)}, not an object of fields; {REMEDY}")
    validate_config(config, where=where)
    return config


def validate_config(config: Mapping[str, Any], *, where: str) -> None:
    """Raise ``ModelConfigError`` where a field holds what no model has."""
    if _depth(config) > MAX_NESTING:
        raise ModelConfigError(f"{where} is nested deeper than {MAX_NESTING} levels; {REMEDY}")
    model_type = config.get("model_type")
    if "model_type" not in config:
        raise ModelConfigError(f'{where} has no model_type; add the architecture\'s name, like "llama"')
    if not isinstance(model_type, str) or not model_type:
        raise _wrong(where, "model_type", model_type, "a name like llama")
    architectures = config.get("architectures")
    if architectures is not None and not _is_list_of_text(architectures):
        raise _wrong(where, "architectures", architectures, "a list of class names")
    for path, part in _parts(config):
        _validate_part(part, where=where, prefix=path)


def _parts(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configuration and its nested ones (``text_config`` …), each with the prefix of its fields' names."""
    yield prefix, config
    for key, value in config.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, Mapping):
            yield from _parts(value, f"{prefix}{key}.")


def _validate_part(part: Mapping[str, Any], *, where: str, prefix: str) -> None:
    for name, value in part.items():
        if isinstance(value, float) and not math.isfinite(value):  # 1e999 parses to infinity
            raise _wrong(where, prefix + name, value, "a finite number")
        bound = BOUNDS.get(name)
        if bound is not None and not (value is None and name in OPTIONAL_FIELDS):
            _validate_count(value, bound, where=where, name=prefix + name)
    _validate_heads(part, where=where, prefix=prefix)


def _validate_count(value: Any, bound: Bound, *, where: str, name: str) -> None:
    if bound.per_layer and isinstance(value, list):
        for item in value:
            # A layer without attention or feed-forward has 0 there.
            _validate_count(item, Bound(0, bound.maximum), where=where, name=name)
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(where, name, value, "a whole number")
    if not bound.minimum <= value <= bound.maximum:
        raise _wrong(where, name, value, f"between {bound.minimum} and {bound.maximum}")


def _validate_heads(part: Mapping[str, Any], *, where: str, prefix: str) -> None:
    heads_name, heads = _first(part, HEAD_COUNT_NAMES)
    width_name, width = _first(part, WIDTH_NAMES)
    if heads is None:
        return
    kv_heads = part.get("num_key_value_heads")
    if isinstance(kv_heads, int) and heads % kv_heads:
        raise ModelConfigError(
            f"{where}: {prefix}{heads_name} {heads} is no multiple of num_key_value_heads {kv_heads}; {REMEDY}"
        )
    derived = part.get("model_type") in DERIVED_HEAD_SIZE and part.get("head_dim") is None
    if derived and width is not None and width % heads:
        raise ModelConfigError(
            f"{where}: {prefix}{width_name} {width} is no multiple of {heads_name} {heads} and no head_dim is given; "
            f"{REMEDY}"
        )


def _first(part: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, int | None]:
    for name in names:
        value = part.get(name)
        if isinstance(value, int):
            return name, value
    return names[0], None


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion, at most one more than is allowed."""
    level, values = 0, [value]
    while values and level <= MAX_NESTING:
        level += 1
        inner: list[Any] = []
        for item in values:
            if isinstance(item, Mapping):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        values = [item for item in inner if isinstance(item, Mapping | list)]
    return level


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _wrong(where: str, name: str, value: Any, wanted: str) -> ModelConfigError:
    return ModelConfigError(f"{where}: {name} is {_show(value)}, not {wanted}; {REMEDY}")


def _show(value: Any) -> str:
    text = str(value) if isinstance(value, float) else json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:36]} …"


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
