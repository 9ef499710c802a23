"""A look at the machine: GPUs through their driver, host memory, disk; never a crash where there is no driver."""

from __future__ import annotations

from launchkit.probe.cluster import cluster_for, cluster_from
from launchkit.probe.detect import detect
from launchkit.probe.host import detect_host

__all__ = ["cluster_for", "cluster_from", "detect", "detect_host"]
