"""Host memory with the limits that containers put on it, cores and free disk."""

from __future__ import annotations

import os
from pathlib import Path

from launchkit.detection import Host

# Control group v1 says "no limit" with the largest page-aligned number, about 2**63.
_UNLIMITED_BYTES = 2**60


def detect_host(directory: Path | None = None) -> Host:
    """This machine as processes started here will find it; free disk is that of ``directory`` (default: this one)."""
    import psutil  # lazy: not wanted by who names the GPUs to plan for

    memory = psutil.virtual_memory()
    return Host(
        memory_bytes=memory.total,
        memory_available_bytes=memory.available,
        memory_limit_bytes=memory_limit_bytes(),
        num_cpu_cores=_num_usable_cores(),
        disk_free_bytes=psutil.disk_usage(str(directory or Path.cwd())).free,
    )


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The smallest memory limit of any control group that this process is in, 0 without one.

    Source: Linux ``Documentation/admin-guide/cgroup-v2.rst`` (``memory.max``) and ``cgroup-v1/memory.rst``
    (``memory.limit_in_bytes``). A limit of a parent group holds for its children.
    """
    limits = [limit for path in _limit_files(root) if (limit := _limit(path)) is not None]
    return min(limits, default=0)


def _limit_files(root: Path) -> list[Path]:
    mounts = root / "sys/fs/cgroup"
    files: list[Path] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (mounts / "memory", "memory.limit_in_bytes") if controllers else (mounts, "memory.max")
        here = base / group.lstrip("/")
        files += [directory / name for directory in (here, *here.parents) if directory.is_relative_to(base)]
    return files


def _limit(path: Path) -> int | None:
    text = "".join(_lines(path))
    if not text.isdecimal() or int(text) >= _UNLIMITED_BYTES:
        return None
    return int(text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _num_usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    import psutil  # lazy, as above

    return psutil.cpu_count() or 1
