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


def read_zero_settings(text: str) -> ZeroSettings:
    """The settings that ``text`` names, and the defaults elsewhere. Raises ``UsageError``."""
    pairs = [part.partition("=") for part in text.replace(" ", "").split(",") if part]
    values: dict[str, Any] = {key: _value(key, value) for key, _, value in pairs}
    return ZeroSettings(**values)


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
