"""The presets that ``--preset`` knows, as ``launchkit explain presets`` lists them."""

from __future__ import annotations

from collections.abc import Sequence

from launchkit.report.text import Canvas, Ink
from launchkit.request import Preset, option_text


def render_presets(presets: Sequence[Preset], *, canvas: Canvas) -> str:
    """Each preset with what it is, the flags that it stands for, and where they are from."""
    lines = []
    for preset in presets:
        flags = [option_text(name, value) for name, value in preset.flags.items()]
        lines += ["", canvas.paint(f" {preset.name}", Ink.LABEL)]
        for items in (preset.description.split(), flags, f"from {preset.source}".split()):
            lines += canvas.flow(items, first="   ", rest="   ", separator=" ")
    return "\n".join(lines) + "\n"
