"""Locks of killed extension builds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launchkit.process import extensions
from launchkit.process.extensions import extensions_root, stale_locks


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TORCH_EXTENSIONS_DIR": "/ext", "HOME": "/h"}, "/ext"),
        ({"HOME": "/h"}, "/h/.cache/torch_extensions"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/c"}, "/c/torch_extensions"),
    ],
)
def test_extensions_root(environment: dict[str, str], expected: str) -> None:
    assert extensions_root(environment) == Path(expected)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    ("age_seconds", "builds", "is_stale"), [(3600, False, True), (1, False, False), (3600, True, False)]
)
def test_stale_locks(
    age_seconds: float, builds: bool, is_stale: bool, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(lock, (0, time.time() - age_seconds))
    monkeypatch.setattr(extensions, "_builder_is_running", lambda: builds)
    environment = {"TORCH_EXTENSIONS_DIR": str(lock.parents[2])}
    assert stale_locks(environment) == ((lock,) if is_stale else ())


def test_no_cache_no_locks(tmp_path: Path) -> None:
    assert stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path / "none")}) == ()
