"""Scenario flags from the environment, from ``launchkit.toml`` and from a preset, below what is typed."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from launchkit.alloc_conf import VARIABLE, AllocatorSettings, read_variable
from launchkit.catalog.presets import find_preset
from launchkit.errors import UsageError
from launchkit.request import FLAGS, Request, find_flag

PREFIX = "LAUNCHKIT_"
PRESET = "preset"  # names a set of flags, and can be set wherever they can
NAMES = (PRESET, *(flag.name for flag in FLAGS))
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
    """A request, and where each flag that was not typed came from; ``preset`` is the name of one, if any. ``notes`` say
    what of the environment does not count."""

    request: Request
    origins: Mapping[str, str]
    preset: str = ""
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """``--gpus 2x4090 (LAUNCHKIT_GPUS)``, for all that was not typed; empty when nothing took effect."""
        values = {**self.request.given(), PRESET: self.preset}
        groups = groupby(self.origins, key=self.origins.__getitem__)  # a preset has many, and is named once
        return ", ".join(
            f"{' '.join(f'{_option(name)} {values[name]}' for name in names)} ({origin})" for origin, names in groups
        )


def gather(typed: Mapping[str, object], *, environment: Mapping[str, str], directory: Path) -> Settings:
    """Typed flags, then ``LAUNCHKIT_*``, then the file in ``directory``, then the preset that one of them names; the
    first that has a flag wins. Of the GPUs found here torch's own variable counts too."""
    values: dict[str, object] = {name: value for name, value in typed.items() if value is not None}
    origins: dict[str, str] = {}
    for origin, found in (*_from_environment(environment), *_from_file(directory)):
        _fill(values, found, origins=origins, origin=origin)
    preset = find_preset(str(values.pop(PRESET))) if PRESET in values else None
    if preset is not None:
        _fill(values, preset.flags, origins=origins, origin=f"preset {preset.name}")
    notes: tuple[str, ...] = ()
    if is_detected(values.get("gpus")) and "alloc_conf" not in values:
        notes = _take_alloc_conf(values, environment, origins=origins)
    return Settings(
        request=Request.from_flags(values), origins=origins, preset=preset.name if preset else "", notes=notes
    )


def _take_alloc_conf(
    values: dict[str, object], environment: Mapping[str, str], *, origins: dict[str, str]
) -> tuple[str, ...]:
    """Torch's own variable, which is no typing slip of ours: where it says more than is modelled, a note says so."""
    variable, conf = read_variable(environment)
    try:
        AllocatorSettings.parse(conf)
    except UsageError as error:
        reason = str(error).removeprefix(VARIABLE).strip().partition(";")[0]
        return (f"{variable} {reason}: planned as if it were not set",)
    if conf:
        _fill(values, {"alloc_conf": conf}, origins=origins, origin=variable)
    return ()


def is_detected(gpus: object) -> bool:
    """Whether the GPUs are this machine's, where the environment is that of the run."""
    return gpus is None or str(gpus).lower().endswith("auto")


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like ours and mean nothing: a typing slip that should not pass in silence."""
    known = {PREFIX + name.upper() for name in NAMES} | OTHER_VARIABLES
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)


def current() -> tuple[Mapping[str, str], Path]:
    """This process's environment and working directory."""
    return os.environ, Path.cwd()


def _fill(values: dict[str, object], found: Mapping[str, object], *, origins: dict[str, str], origin: str) -> None:
    """Adds what is not among ``values`` yet, and where it is from."""
    for name, value in found.items():
        if name not in values:
            values[name] = value
            origins[name] = origin


def _option(name: str) -> str:
    return f"--{PRESET}" if name == PRESET else find_flag(name).option


def _from_environment(environment: Mapping[str, str]) -> list[tuple[str, Mapping[str, object]]]:
    names = {name: PREFIX + name.upper() for name in NAMES}
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
    try:
        return {name if name == PRESET else find_flag(name).name: value for name, value in table.items()}
    except UsageError as error:
        raise UsageError(f"{path.name}: {error}") from None
