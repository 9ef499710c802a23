"""DeepSpeed's ``zero_optimization`` keys as short text: ``reduce_bucket_size=5e7,overlap_comm=false``."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from launchkit.errors import UsageError
from launchkit.scenario import ZeroSettings

OPTION = "--zero-settings"
_KEYS = {field.name: str(field.type).removesuffix(" | None") for field in fields(ZeroSettings)}
_SWITCHES = {"true": True, "false": False}


def read_zero_settings(text: str, *, hidden_size: int) -> ZeroSettings:
    """The settings that ``text`` names, and the defaults elsewhere. Raises ``UsageError``.

    ``auto`` is what accelerate and the Hugging Face Trainer fill in from the model's hidden size.
    """
    pairs = [part.partition("=") for part in text.replace(" ", "").split(",") if part]
    auto = auto_sizes(hidden_size)
    values: dict[str, Any] = {}
    for key, _, written in pairs:
        values[key] = auto[key] if written == "auto" and key in auto else _value(key, written)
    return ZeroSettings(**values)


def auto_sizes(hidden_size: int) -> dict[str, int]:
    """What ``auto`` stands for, in elements. Source: transformers 5.23 ``HfTrainerDeepSpeedConfig``, accelerate 1.15
    ``Accelerator._prepare_deepspeed``."""
    return {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def zero_settings_text(settings: ZeroSettings) -> str:
    """What to type to get ``settings``: every key that is not the default's; empty where none is."""
    default = ZeroSettings()
    values = {key: getattr(settings, key) for key in _KEYS}
    return ",".join(f"{key}={_written(value)}" for key, value in values.items() if value != getattr(default, key))


def _value(key: str, written: str) -> int | bool | str:
    kind = _KEYS.get(key)
    if kind is None:
        near = difflib.get_close_matches(key, _KEYS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"it takes {', '.join(_KEYS)}"
        raise UsageError(f"{OPTION} {key} is unknown; {advice}")
    if kind == "str":
        return written
    if kind == "bool":
        if written.lower() not in _SWITCHES:
            raise UsageError(f"{OPTION} {key}={written} is neither on nor off; write {key}=true or {key}=false")
        return _SWITCHES[written.lower()]
    return _count(key, written)


def _count(key: str, written: str) -> int:
    """A whole number; DeepSpeed's documentation writes ``5e8`` for one."""
    try:
        number = float(written)
    except ValueError:
        number = -1
    if number < 0 or number != int(number):
        raise UsageError(f"{OPTION} {key}={written} is not a whole number of elements; write {key}=5e7")
    return int(number)


def _written(value: int | bool | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
