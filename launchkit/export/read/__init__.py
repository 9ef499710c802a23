"""Reading the files that ``export`` writes, and those that people wrote: text in, launchkit's own words out.

Pure like the exporters, whose inverse this is: a file that another one names is got through ``Place.open_file``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from launchkit.export.lint import Tool
from launchkit.export.read.accelerate import read_accelerate
from launchkit.export.read.axolotl import read_axolotl
from launchkit.export.read.deepspeed import read_deepspeed_config
from launchkit.export.read.reading import Place, Reading
from launchkit.export.read.section import Section
from launchkit.export.read.shipped import TRL_ACCELERATE
from launchkit.export.read.text import ADVICE, MAXIMUM_FILE_BYTES, parse_config, repeated_keys
from launchkit.export.read.trl import read_trl

__all__ = [
    "ADVICE",
    "MAXIMUM_FILE_BYTES",
    "Place",
    "Reading",
    "parse_config",
    "read_config",
    "repeated_keys",
    "spread_of",
]

_READERS: Mapping[Tool, Callable[[Mapping[str, Any], Place], Reading]] = {
    Tool.ACCELERATE: read_accelerate,
    Tool.AXOLOTL: read_axolotl,
    Tool.DEEPSPEED: read_deepspeed_config,
    Tool.TRL: read_trl,
}


def read_config(config: Mapping[str, Any], *, tool: Tool, place: Place) -> Reading:
    """What a file of ``tool`` says. Raises ``ConfigFileError`` for a value of the wrong type."""
    return _READERS[tool](config, place)


def spread_of(
    config: Mapping[str, Any], *, tool: Tool, file: str, open_file: Callable[[str], str | None] = lambda name: None
) -> tuple[int, int, bool]:
    """Machines, processes over all of them (0 where the file does not say), and whether they are CPU processes."""
    if tool not in (Tool.ACCELERATE, Tool.TRL):
        return 1, 0, False
    keys = Section(config, file=file)
    name = keys.text("accelerate_config") or ""
    text = open_file(name) if name else None
    named = TRL_ACCELERATE.get(name, {}) if text is None else parse_config(text, name=name)
    launch = Section({**named, **config}, file=file)
    processes = launch.count("num_processes") or 0
    return launch.count("num_machines") or 1, processes, keys.switch("use_cpu") or False
