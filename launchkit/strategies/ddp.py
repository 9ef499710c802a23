"""DistributedDataParallel: the single-GPU step, plus flat buckets that gradients are copied to and reduced in.

Source: torch 2.13 ``torch/nn/parallel/distributed.py`` (``_ddp_init_helper``) and
``torch/csrc/distributed/c10d/reducer.cpp``: buckets are allocated when the module is wrapped, and anew, in the
order in which gradients arrived, before the second step's forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from launchkit.hardware import Cluster
from launchkit.program import Collective, CollectiveKind, Moment, Owner, Persistent, Phase, Section, Size, StepProgram
from launchkit.scenario import DdpSettings, Scenario, State
from launchkit.strategies import single
from launchkit.strategies.base import (
    arriving_gradients,
    gradient_bytes,
    gradients_die_when_ready,
    lora_rank,
    map_sections,
    whole_tensors,
)

trace_key = single.trace_key
refusal = single.refusal


def rewrite(program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> StepProgram:
    """Every rank holds everything; gradients exist twice unless they are views of the buckets."""
    buckets = bucket_storages(program, scenario=scenario)
    reduced = map_sections(
        program, Phase.BACKWARD, lambda stage, section: _reduced(program, section, rank=lora_rank(scenario))
    )
    rewritten = single.rewrite(reduced, scenario=scenario, cluster=cluster)
    if scenario.strategy.ddp.gradient_as_bucket_view:
        rewritten = _without_own_gradients(rewritten)
    return replace(rewritten, persistent=rewritten.persistent + buckets)


def bucket_storages(program: StepProgram, *, scenario: Scenario) -> tuple[Persistent, ...]:
    """The flat buffers, and with ``find_unused_parameters`` the map of what was used."""
    settings = scenario.strategy.ddp
    gradients = arriving_gradients(program, rank=lora_rank(scenario))
    limits = bucket_limits(settings, first_step=scenario.state is State.FIRST)
    sizes = list(assign_buckets(gradients, limits))
    if settings.find_unused_parameters:
        sizes.append(4 * len(whole_tensors(program, scenario=scenario)))  # int32 per parameter
    return tuple(Persistent(Size.constant(size), Owner.COMMUNICATION) for size in sizes)


def bucket_limits(settings: DdpSettings, *, first_step: bool) -> tuple[int, ...]:
    """Bytes at which the first bucket is closed, the second, and (the last limit) every one after.

    Buckets that will be rebuilt in the order of arrival start as a single one; without rebuilding (which
    ``find_unused_parameters`` rules out) they have their final sizes from the start.
    """
    if first_step and (settings.static_graph or not settings.find_unused_parameters):
        return ()
    return (settings.first_bucket_bytes, settings.bucket_cap_bytes)


def assign_buckets(gradients: Iterable[tuple[int, int]], limits: tuple[int, ...]) -> Iterator[int]:
    """Bytes of each bucket. A bucket holds one dtype and is closed by the gradient that reaches its limit.

    Source: ``compute_bucket_assignment_by_size`` in ``reducer.cpp``. No limits: one bucket per dtype.
    """
    filled: dict[int, int] = {}
    closed: dict[int, int] = {}
    for itemsize, num_bytes in gradients:
        filled[itemsize] = filled.get(itemsize, 0) + num_bytes
        position = closed.get(itemsize, 0)
        if limits and filled[itemsize] >= limits[min(position, len(limits) - 1)]:
            yield filled.pop(itemsize)
            closed[itemsize] = position + 1
    yield from filled.values()


def _reduced(program: StepProgram, section: Section, *, rank: int) -> Section:
    """``section`` with an all-reduce of what it completes.

    Omits: a bucket is sent when it is full, not when a layer is done. The bytes are the same; the messages here are
    as many as layers, so that equal layers stay equal.
    """
    num_bytes = sum(gradient_bytes(program, section, rank=rank))
    if not num_bytes:
        return section
    message = Collective(CollectiveKind.ALL_REDUCE, Size.constant(num_bytes), Moment.AFTER)
    return replace(section, collectives=(*section.collectives, message))


def _without_own_gradients(program: StepProgram) -> StepProgram:
    """``gradient_as_bucket_view``: a gradient is copied into its bucket and becomes a view of it."""
    persistent = tuple(p for p in program.persistent if p.owner is not Owner.GRADIENTS)
    return replace(map_sections(program, Phase.BACKWARD, gradients_die_when_ready), persistent=persistent)
