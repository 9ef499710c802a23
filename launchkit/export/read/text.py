"""From the text of a YAML or JSON file to plain values. Nothing in it is executed or constructed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from launchkit.errors import ConfigFileError

MAXIMUM_FILE_BYTES = 1024**2  # the longest files of these tools have a few hundred lines
_MAXIMUM_VALUES = 20_000  # once aliases are followed: a few lines of them unfold to billions of values
_MAXIMUM_DEPTH = 30


def parse_config(text: str, *, name: str) -> Mapping[str, Any]:
    """The mapping that ``text`` holds; anything else raises ``ConfigFileError``.

    JSON is read as JSON, since YAML 1.1 takes its ``1e5`` for text. YAML is loaded safely: anchors and merge keys work,
    tags that would construct something are refused.
    """
    values = _loaded(text, name=name)
    if not isinstance(values, Mapping):
        kind = {list: "a list", type(None): "empty"}.get(type(values), "a single value")
        raise ConfigFileError(f"{name} is {kind}, not keys with values; {ADVICE}")
    _check_size(values, name=name)
    return {str(key): value for key, value in values.items()}


def repeated_keys(text: str) -> tuple[str, ...]:
    """Top-level keys that stand twice in a YAML text, of which the loaders of these tools keep the last."""
    if _is_json(text):
        return ()
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    keys = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    return tuple(dict.fromkeys(key for key in keys if keys.count(key) > 1))


ADVICE = "give a YAML of Axolotl, accelerate or TRL, or a JSON of DeepSpeed"


def _loaded(text: str, *, name: str) -> object:
    if len(text) > MAXIMUM_FILE_BYTES:
        raise ConfigFileError(f"{name} holds {len(text):,} characters, too many for a configuration; {ADVICE}")
    try:
        return json.loads(text) if _is_json(text) else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if _is_json(text) else "YAML"
        raise ConfigFileError(f"{name} is not {kind} ({_reason(error)}); {ADVICE}") from None


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def _reason(error: Exception) -> str:
    """The first line of what the parser says, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).partition("\n")[0][:120]


def _check_size(values: object, *, name: str) -> None:
    for count, _ in enumerate(_walk(values, name=name)):
        if count > _MAXIMUM_VALUES:
            raise ConfigFileError(f"{name} unfolds to more than {_MAXIMUM_VALUES:,} values; {ADVICE}")


def _walk(value: object, *, name: str, depth: int = 0) -> Iterator[object]:
    if depth > _MAXIMUM_DEPTH:
        raise ConfigFileError(f"{name} is nested more than {_MAXIMUM_DEPTH} deep; {ADVICE}")
    yield value
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for child in children:
        yield from _walk(child, name=name, depth=depth + 1)
