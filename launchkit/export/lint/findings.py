"""A finding, and what the checks of all tools share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """``error``: it will not run, or not as written. ``warning``: it runs, and is seldom what is meant."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """``path`` is dotted, from the top of the file."""

    path: str
    problem: str
    fix: str
    severity: Severity = Severity.ERROR

    @property
    def text(self) -> str:
        return f"{self.path}: {self.problem}; {self.fix}"


IGNORED = "would be ignored"
REFUSED = "would be refused"
Config = Mapping[str, Any]
Findings = Iterator[Finding]
Check = Callable[[Config], Findings]


def unknown_keys(
    section: object, known: Collection[str], *, path: str = "", prefix: str = "", effect: str = IGNORED
) -> Findings:
    """Keys outside ``known``; ``prefix`` is optional before each, ``effect`` is what the tool does with such a key."""
    for key in section if isinstance(section, Mapping) else ():
        name = str(key).removeprefix(prefix)
        if name in known:
            continue
        similar = difflib.get_close_matches(name, known, n=1)
        hint = f"write {prefix}{similar[0]}" if similar else "remove it"
        yield Finding(path=f"{path}{key}", problem=f"is no key here, and {effect}", fix=hint)


def section_of(config: Config, name: str) -> Config:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def choice(config: Config, path: str, choices: Collection[str]) -> Findings:
    """The last part of ``path`` must be one of ``choices`` where it is given."""
    value = config.get(path.rpartition(".")[2])
    if value is not None and str(value) not in choices:
        yield Finding(path=path, problem=f"{value!r} is not a choice", fix=f"write one of {', '.join(choices)}")


def is_true(value: object) -> bool:
    """Truth as the tools read it: booleans, and the text of booleans."""
    return value is True or str(value).lower() in ("true", "1", "yes")
