"""Locks that killed builds of C++ extensions leave behind: the next run would wait for them forever."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

BUILDERS = frozenset({"ninja", "cc1plus", "c++", "g++", "clang++", "nvcc", "cicc"})


def extensions_root(environment: Mapping[str, str]) -> Path:
    """Where torch builds extensions. Source: ``torch.utils.cpp_extension._get_build_directory`` (torch 2.13)."""
    if environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(environment["TORCH_EXTENSIONS_DIR"])
    cache = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "~"), ".cache")
    return Path(cache).expanduser() / "torch_extensions"


def stale_locks(environment: Mapping[str, str], *, minimum_age_seconds: float = 60.0) -> tuple[Path, ...]:
    """Lock files older than ``minimum_age_seconds`` while no compiler of this user runs."""
    root = extensions_root(environment)
    now = time.time()
    found = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    old = tuple(sorted(path for path in found if now - _modified(path, default=now) >= minimum_age_seconds))
    return () if not old or _builder_is_running() else old


def _modified(path: Path, *, default: float) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return default


def _builder_is_running() -> bool:
    names = (process.info["name"] for process in psutil.process_iter(["name"]))
    return any(name in BUILDERS for name in names)
