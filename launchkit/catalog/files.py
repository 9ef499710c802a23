"""Where the data files that ship with launchkit are found."""

from __future__ import annotations

from pathlib import Path


def profiles_directory() -> Path:
    """The directory that holds ``gpus/``, ``nodes/``, ``models/`` and ``presets/``.

    A wheel carries it inside the package (``launchkit/profiles``); in a source checkout, editable installs included,
    it lies beside the package.
    """
    package = Path(__file__).resolve().parent.parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"
