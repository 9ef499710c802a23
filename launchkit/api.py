"""The Python API: what ``launchkit.plan`` and ``launchkit.estimate`` do, and the command line with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launchkit import planner
from launchkit.catalog.hardware import hardware_table
from launchkit.catalog.models import Progress, find_model
from launchkit.catalog.presets import find_preset
from launchkit.dataset import measure_lengths
from launchkit.errors import UsageError
from launchkit.hardware import Cluster, with_host_memory
from launchkit.lengths import Lengths
from launchkit.model import ModelProfile, ModelSource
from launchkit.plan import Candidate, Plan
from launchkit.planner.evaluate import Bench
from launchkit.planner.point import point_of
from launchkit.probe.spec import cluster_for
from launchkit.program import StepProgram
from launchkit.request import Request, resolve
from launchkit.scenario import TraceKey

if TYPE_CHECKING:
    from launchkit.export.check import FileCheck


def plan(
    model: str,
    *,
    preset: str | None = None,
    trust_remote_code: bool = False,
    in_full: bool = False,
    **flags: str | int | bool | None,
) -> Plan:
    """The best way to fine-tune ``model``; ``flags`` are the command line's (``gpus="4x4090", seq_len=4096``).

    ``in_full`` runs alternatives and what is rejected through the allocator too: exact figures instead of ranges.
    """
    request = _request(flags, preset=preset)
    return plan_request(model, request, trust_remote_code=trust_remote_code, in_full=in_full)


def estimate(
    model: str, *, preset: str | None = None, trust_remote_code: bool = False, **flags: str | int | bool | None
) -> Candidate:
    """Memory and speed of exactly one scenario; a flag that is not given has the preset's value, or its default."""
    return estimate_request(model, _request(flags, preset=preset), trust_remote_code=trust_remote_code)[0]


def check(
    path: str | Path,
    *,
    model: str | None = None,
    preset: str | None = None,
    trust_remote_code: bool = False,
    **flags: str | int | bool | None,
) -> FileCheck:
    """A file of Axolotl, accelerate, DeepSpeed or TRL: what it takes, what is wrong in it, what to change.

    ``model`` and ``flags`` win over what the file says, and say what it leaves open.
    """
    request = _request(flags, preset=preset)
    return check_request(Path(path), request, model=model, trust_remote_code=trust_remote_code)


def plan_request(
    model: str,
    request: Request,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    in_full: bool = False,
) -> Plan:
    """``plan`` of a request that has been read already."""
    cluster = find_cluster(request.gpus, host_memory=request.host_memory)
    source = find_source(model, request, trust_remote_code=trust_remote_code, progress=progress)
    lengths = find_lengths(model, request, source.profile, progress=progress)
    return planner.plan(source, cluster=cluster, request=request, lengths=lengths, in_full=in_full, progress=progress)


def estimate_request(
    model: str, request: Request, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> tuple[Candidate, Cluster]:
    """``estimate`` of a request that has been read already, with the cluster that it is about."""
    cluster = find_cluster(request.gpus, host_memory=request.host_memory)
    source = find_source(model, request, trust_remote_code=trust_remote_code, progress=progress)
    lengths = find_lengths(model, request, source.profile, progress=progress)
    fitted = planner.fit_to_data(request, lengths, model=source.profile)
    resolution = resolve(fitted.request, model=source.profile, cluster=cluster)
    candidate = planner.estimate(source, cluster=cluster, scenario=resolution.scenario, lengths=lengths)
    return replace(candidate, notes=(*fitted.notes, *resolution.notes, *candidate.notes)), cluster


def check_request(
    path: Path,
    request: Request,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FileCheck:
    """``check`` of a request that has been read already. Reads files, and writes none."""
    from launchkit.checking import FileText, judge_file  # lazy: planning needs no reader of files

    file = FileText.at(path)
    cluster = file.cluster(request.gpus, find=find_cluster)
    reading = file.read(cluster=cluster, given=request)
    if not (name := model or reading.model):
        raise UsageError(f"{path.name} names no model; add --model ID, such as --model Qwen/Qwen3-8B")
    source = find_source(name, request, trust_remote_code=trust_remote_code, progress=progress)
    return judge_file(file, reading, source=source, cluster=cluster, given=request)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A step program, and which one of which model it is."""

    profile: ModelProfile
    key: TraceKey
    program: StepProgram
    lora_rank: int


def trace_request(
    model: str, request: Request, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> Traced:
    """The step program that ``estimate`` of the same request starts from; traced where nobody has yet."""
    cluster = find_cluster(request.gpus, host_memory=request.host_memory)
    source = find_source(model, request, trust_remote_code=trust_remote_code, progress=progress)
    scenario = resolve(request, model=source.profile, cluster=cluster).scenario
    key = Bench(source=source, cluster=cluster).key(scenario)
    rank = point_of(scenario).lora_rank
    return Traced(profile=source.profile, key=key, program=source.program(key), lora_rank=rank)


def find_source(
    model: str, request: Request, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> ModelSource:
    """The model of a hub id, a directory or a ``config.json``."""
    return find_model(model, config_path=request.config, trust_remote_code=trust_remote_code, progress=progress)


def find_lengths(
    model: str, request: Request, profile: ModelProfile, *, progress: Progress | None = None
) -> Lengths | None:
    """How long the examples of ``--data`` are in the model's tokens. None where there is no such file, or where a row
    of text is not what the model takes."""
    if request.data is None or request.images or profile.task != "causal-lm" or not Path(request.data).is_file():
        return None
    return measure_lengths(request.data, model=model if Path(model).exists() else profile.name, progress=progress)


def find_cluster(spec: str | None, *, host_memory: str | None = None) -> Cluster:
    """The cluster that a GPU spec names; nothing, ``auto`` and ``2xauto`` are what this machine has. ``host_memory`` is
    what each node is said to have."""
    cluster = cluster_for(spec, hardware_table())
    return cluster if host_memory is None else with_host_memory(cluster, host_memory)


def _request(flags: Mapping[str, str | int | bool | None], *, preset: str | None) -> Request:
    return Request.from_flags(flags if preset is None else find_preset(preset).below(flags))
