"""Named sets of flags from published recipes, read from ``profiles/presets``.

A file holds ``presets``; every row names what it is from and where that says so. A row fixes what the recipe fixes and
leaves the rest open, attention and GPUs always. What no trace stands for is not shipped.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path

from launchkit.catalog.files import profiles_directory
from launchkit.errors import UsageError
from launchkit.request import Preset, Request


@cache
def load_presets(profiles: Path | None = None) -> tuple[Preset, ...]:
    """Every preset in ``profiles`` (by default what ships with launchkit), files in the order of their names."""
    directory = (profiles or profiles_directory()) / "presets"
    return tuple(
        Preset(
            name=row["name"],
            description=row["description"],
            flags=Request.from_flags(row["flags"]).given(),
            source=row["source"],
        )
        for path in sorted(directory.glob("*.json"))
        for row in json.loads(path.read_text(encoding="utf-8"))["presets"]
    )


def find_preset(name: str) -> Preset:
    """The preset of that name; ``-`` and ``_`` mean the same. ``UsageError`` with the nearest one otherwise."""
    presets = {preset.name: preset for preset in load_presets()}
    wanted = name.strip().lower().replace("_", "-")
    preset = presets.get(wanted)
    if preset is not None:
        return preset
    near = difflib.get_close_matches(wanted, presets, n=1)
    advice = f"did you mean {near[0]}?" if near else "launchkit explain presets lists them all"
    raise UsageError(f"--preset {name} is unknown; {advice}")
