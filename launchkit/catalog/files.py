"""Where the data files that ship with launchkit are found."""

from __future__ import annotations

from pathlib import Path


def profiles_directory() -> Path:
    """The directory that holds ``gpus/``, ``nodes/`` and ``models/``."""
    return _shipped("profiles")


def examples_directory() -> Path:
    """The directory that holds ``train.py`` and ``data/``."""
    return _shipped("examples")


def _shipped(name: str) -> Path:
    """A wheel carries these inside the package; in a checkout, editable installs included, they lie beside it."""
    package = Path(__file__).resolve().parent.parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
