"""The Python API: what ``launchkit.plan`` and ``launchkit.estimate`` do, and the command line with them."""

from __future__ import annotations

import re
from dataclasses import replace

from launchkit import planner
from launchkit.catalog.hardware import hardware_table
from launchkit.catalog.models import Progress, find_model
from launchkit.errors import UnknownGpuError
from launchkit.hardware import Cluster, parse_gpus
from launchkit.model import ModelSource
from launchkit.plan import Candidate, Plan
from launchkit.probe import cluster_from, detect
from launchkit.request import Request, resolve

_SOME_DETECTED = re.compile(r"(\d+)[x×*]auto", re.IGNORECASE)


def plan(model: str, *, trust_remote_code: bool = False, **flags: str | int | bool | None) -> Plan:
    """The best way to fine-tune ``model``; ``flags`` are the command line's (``gpus="4x4090", seq_len=4096``)."""
    return plan_request(model, Request.from_flags(flags), trust_remote_code=trust_remote_code)


def estimate(model: str, *, trust_remote_code: bool = False, **flags: str | int | bool | None) -> Candidate:
    """Memory and speed of exactly one scenario; a flag that is not given has its default."""
    return estimate_request(model, Request.from_flags(flags), trust_remote_code=trust_remote_code)[0]


def plan_request(
    model: str, request: Request, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> Plan:
    """``plan`` of a request that has been read already."""
    cluster = find_cluster(request.gpus)
    source = find_source(model, request, trust_remote_code=trust_remote_code, progress=progress)
    return planner.plan(source, cluster=cluster, request=request)


def estimate_request(
    model: str, request: Request, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> tuple[Candidate, Cluster]:
    """``estimate`` of a request that has been read already, with the cluster that it is about."""
    cluster = find_cluster(request.gpus)
    source = find_source(model, request, trust_remote_code=trust_remote_code, progress=progress)
    resolution = resolve(request, model=source.profile, cluster=cluster)
    candidate = planner.estimate(source, cluster=cluster, scenario=resolution.scenario)
    return replace(candidate, notes=(*resolution.notes, *candidate.notes)), cluster


def find_source(
    model: str, request: Request, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> ModelSource:
    """The model of a hub id, a directory or a ``config.json``."""
    return find_model(model, config_path=request.config, trust_remote_code=trust_remote_code, progress=progress)


def find_cluster(spec: str | None) -> Cluster:
    """The cluster that a GPU spec names; ``auto`` or nothing is what this machine has, ``2xauto`` two GPUs of it."""
    table = hardware_table()
    if spec is None or spec.strip().lower() == "auto":
        return cluster_from(detect(), table)
    some = _SOME_DETECTED.fullmatch(spec.strip())
    if some is None:
        return parse_gpus(spec, table)
    return _some_of(cluster_from(detect(), table), num_gpus=int(some[1]))


def _some_of(found: Cluster, *, num_gpus: int) -> Cluster:
    is_cpu = found.gpu.device_kind.value == "cpu"
    if num_gpus < 1 or (num_gpus > found.node.num_gpus and not is_cpu):
        raise UnknownGpuError(
            f"{num_gpus} GPUs were asked for and {found.node.num_gpus} are here; "
            f"name others with --gpus {num_gpus}x{found.gpu.name.replace(' ', '-')}"
        )
    return replace(found, node=replace(found.node, num_gpus=num_gpus))
