"""The cluster that ``--gpus`` names: what is stated, or what is here."""

from __future__ import annotations

import re

from launchkit.hardware import Backend, Cluster, HardwareTable, parse_gpus

_SOME_DETECTED = re.compile(r"([0-9]{1,6}) ?[x×] ?auto", re.IGNORECASE)


def cluster_for(spec: str | None, table: HardwareTable) -> Cluster:
    """The cluster that ``--gpus`` names: ``auto`` (or nothing) and ``2xauto`` are what is here, ``cpu`` and ``2xcpu``
    processes on this machine, with its memory; anything else is read by ``parse_gpus``."""
    text = (spec or "auto").strip()
    some = _SOME_DETECTED.fullmatch(text)
    if text.lower() == "auto" or some:
        from launchkit.probe.cluster import cluster_from  # lazy, as below: what is stated needs no look at the machine
        from launchkit.probe.detect import detect

        return cluster_from(detect(), table, num_gpus=int(some[1]) if some else None)
    stated = parse_gpus(text, table)
    if stated.gpu.backend is not Backend.CPU:
        return stated
    from launchkit.probe.cluster import host_cluster
    from launchkit.probe.host import detect_host

    return host_cluster(detect_host(), table, num_processes=stated.num_gpus)
