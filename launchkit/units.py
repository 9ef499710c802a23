"""Byte and rate units, and the few ways launchkit prints them."""

from __future__ import annotations

KIB = 1024
MIB = 1024**2
GIB = 1024**3
GB = 10**9


def gib(num_bytes: float, *, digits: int = 1) -> str:
    """Memory as text: ``20.9 GiB``; below one GiB in MiB, below one MiB in KiB."""
    if abs(num_bytes) >= GIB * 0.9995:
        return f"{num_bytes / GIB:.{digits}f} GiB"
    if abs(num_bytes) >= MIB:
        return f"{num_bytes / MIB:.0f} MiB"
    return f"{num_bytes / KIB:.0f} KiB"


def gigabytes(num_bytes: float) -> str:
    """Disk space as text, in decimal units as disks are sold: ``0.2 GB``."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size or (unit == "GB" and num_bytes >= 10**8):
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1000:.0f} kB"


def count(number: float) -> str:
    """A large count as text: ``8.19B``, ``134.5M``."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            value = number / size
            return f"{value:.2f}{unit}" if value < 100 else f"{value:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """A time span as text: ``3.4 h``, ``41 s``, ``320 ms``."""
    if seconds >= 3600 * 48:
        return f"{seconds / 86400:.1f} d"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def divide_up(value: int, parts: int) -> int:
    """``ceil(value / parts)`` on integers."""
    return -(-value // parts)
