"""A section of a file, read key by key: values of the right type, or one clear error, and what nobody asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launchkit.errors import ConfigFileError
from launchkit.export.lint.findings import is_true
from launchkit.request import MAXIMUM_COUNT

AUTO = "auto"
MAXIMUM_ELEMENTS = 1e18  # of a buffer: more than any that there is, so that infinities are none
_FALSE = ("false", "0", "no", "off")
_SHOWN_CHARACTERS = 40


class Section:
    """Mutable on purpose: it remembers which keys were read, so that the others can be reported.

    ``None`` counts as not written, as it does for these tools. ``prefix`` may stand before each key, or not.
    """

    def __init__(self, values: Mapping[str, Any], *, file: str, path: str = "", prefix: str = "") -> None:
        self._values = {str(key): value for key, value in values.items() if value is not None}
        self._file = file
        self._path = path
        self._prefix = prefix
        self._read: set[str] = set()
        self._parts: dict[str, Section] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def has(self, key: str) -> bool:
        return self._name(key) in self._values

    def get(self, key: str) -> Any:
        """The value as it stands, None where there is none."""
        name = self._name(key)
        self._read.add(name)
        return self._values.get(name)

    def skip(self, *keys: str) -> None:
        """Counts keys as read that say how and not what, or nothing in what is counted."""
        self._read.update(self._name(key) for key in keys)

    def where(self, key: str) -> str:
        """The key with its path: ``fsdp_config.offload_params``, as the file spells it."""
        return f"{self._path}{self._name(key)}"

    def count(self, key: str, *, least: int = 1) -> int | None:
        """A whole number; text that is one counts, as it does for pydantic and argparse."""
        value = self.get(key)
        if value is None:
            return None
        try:
            number = -1 if isinstance(value, bool) else int(str(value))
        except ValueError:
            number = -1
        if not least <= number <= MAXIMUM_COUNT:
            raise self._wrong(key, f"not a whole number from {least} on", f"{key}: {max(least, 1)}")
        return number

    def size(self, key: str) -> int | str | None:
        """Elements of a DeepSpeed buffer, which its documentation writes as ``5e8``; or the word ``auto``."""
        value = self.get(key)
        if value is None or value == AUTO:
            return value  # type: ignore[no-any-return]
        try:
            number = -1.0 if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number < MAXIMUM_ELEMENTS or number != int(number):
            raise self._wrong(key, "not a whole number of elements", f"{key}: 50000000")
        return int(number)

    def number(self, key: str) -> float | None:
        """A number from 0 on."""
        value = self.get(key)
        if value is None:
            return None
        try:
            number = -1.0 if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number < float("inf"):
            raise self._wrong(key, "not a number from 0 on", f"{key}: 1.0")
        return number

    def switch(self, key: str, *, auto: bool | None = None) -> bool | None:
        """True or false, or the text of either; ``auto`` is what that word stands for, where it is allowed."""
        value = self.get(key)
        if value is None or (auto is not None and value == AUTO):
            return None if value is None else auto
        if is_true(value):
            return True
        if str(value).lower() in _FALSE:
            return False
        raise self._wrong(key, "neither true nor false", f"{key}: true")

    def text(self, key: str) -> str | None:
        """A word or a path; numbers and switches that YAML made of one are taken back to text."""
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value or None
        if isinstance(value, bool):
            return "yes" if value else "no"  # YAML 1.1 reads ``no`` as false
        if isinstance(value, int | float):
            return str(value)
        raise self._wrong(key, "not a word", f"one value behind {key}")

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names, or names in one text that commas or spaces separate."""
        value = self.get(key)
        if value is None:
            return ()
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise self._wrong(key, "not a list of names", f"{key}: [q_proj, v_proj]")
        return tuple(items)

    def section(self, key: str, *, prefix: str = "") -> Section:
        """The section behind a key; an empty one where there is none."""
        if key not in self._parts:
            value = self.get(key)
            if value is not None and not isinstance(value, Mapping):
                raise self._wrong(key, "not a section of keys", f"keys below {key}:")
            path = f"{self.where(key)}."
            self._parts[key] = Section(value or {}, file=self._file, path=path, prefix=prefix)
        return self._parts[key]

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Paths and values of the keys that nobody asked for, but for those that are switched off."""
        for key, value in self._values.items():
            if key not in self._read and value is not False:
                yield f"{self._path}{key}", value
        for part in self._parts.values():
            yield from part.unread()

    def _name(self, key: str) -> str:
        prefixed = f"{self._prefix}{key}"
        return prefixed if prefixed in self._values else key

    def _wrong(self, key: str, what: str, fix: str) -> ConfigFileError:
        shown = repr(self._values[self._name(key)])
        shown = shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…"
        return ConfigFileError(f"{self._file}: {self.where(key)} is {shown}, {what}; write {fix}")
