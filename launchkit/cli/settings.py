"""Scenario flags from the environment and from ``launchkit.toml``, below what is typed."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launchkit.errors import UsageError
from launchkit.request import FLAGS, Request, find_flag

PREFIX = "LAUNCHKIT_"
# Variables of ours that are no scenario flags; the last line's are set by a launch, for its own processes.
OTHER_VARIABLES = frozenset(
    {
        *("LAUNCHKIT_HOME", "LAUNCHKIT_GROUND_TRUTH", "LAUNCHKIT_VENV"),
        *(
            "LAUNCHKIT_RUN_DIR",
            "LAUNCHKIT_GUARD_PID",
            "LAUNCHKIT_MEASURE",
            "LAUNCHKIT_DEVICE",
            "LAUNCHKIT_CPU_SHARDING",
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A request, and where each flag that was not typed came from."""

    request: Request
    origins: Mapping[str, str]

    @property
    def text(self) -> str:
        """``--gpus 2x4090 (LAUNCHKIT_GPUS)``, for all that was not typed; empty when nothing took effect."""
        given = self.request.given()
        return ", ".join(f"{find_flag(name).option} {given[name]} ({origin})" for name, origin in self.origins.items())


def gather(typed: Mapping[str, object], *, environment: Mapping[str, str], directory: Path) -> Settings:
    """Typed flags, then ``LAUNCHKIT_*``, then the file in ``directory``; the first that has a flag wins."""
    values: dict[str, object] = {name: value for name, value in typed.items() if value is not None}
    origins: dict[str, str] = {}
    for origin, found in (*_from_environment(environment), *_from_file(directory)):
        for name, value in found.items():
            if name not in values:
                values[name] = value
                origins[name] = origin
    return Settings(request=Request.from_flags(values), origins=origins)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like ours and mean nothing: a typing slip that should not pass in silence."""
    known = {PREFIX + flag.name.upper() for flag in FLAGS} | OTHER_VARIABLES
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)


def current() -> tuple[Mapping[str, str], Path]:
    """This process's environment and working directory."""
    return os.environ, Path.cwd()


def _from_environment(environment: Mapping[str, str]) -> list[tuple[str, Mapping[str, object]]]:
    names = {flag.name: PREFIX + flag.name.upper() for flag in FLAGS}
    return [(variable, {name: environment[variable]}) for name, variable in names.items() if environment.get(variable)]


def _from_file(directory: Path) -> list[tuple[str, Mapping[str, object]]]:
    own, project = directory / "launchkit.toml", directory / "pyproject.toml"
    if own.is_file():
        return [(own.name, _table(own, _read(own)))]
    if project.is_file():
        tools = _read(project).get("tool", {})
        return [(project.name, _table(project, tools.get("launchkit", {}) if isinstance(tools, dict) else {}))]
    return []


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} is not TOML ({error}); correct it or remove it") from None


def _table(path: Path, table: object) -> dict[str, object]:
    if not isinstance(table, dict):
        raise UsageError(f"{path.name} has a launchkit setting that is no table; write [tool.launchkit] above it")
    for name in table:
        try:
            find_flag(name)
        except UsageError as error:
            raise UsageError(f"{path.name}: {error}") from None
    return {find_flag(name).name: value for name, value in table.items()}
