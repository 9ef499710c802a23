"""Configuration files of other tools, written from a plan, and their lint. Pure: no file is read or written."""

from __future__ import annotations

from launchkit.export.files import DEFAULT_TARGETS, ConfigFile, Target, config_files

__all__ = ["DEFAULT_TARGETS", "ConfigFile", "Target", "config_files"]
