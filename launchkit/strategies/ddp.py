"""DistributedDataParallel: the single-GPU step, plus flat buckets that gradients are copied to and reduced in.

Source: torch 2.13 ``torch/nn/parallel/distributed.py`` (``_ddp_init_helper``) and
``torch/csrc/distributed/c10d/reducer.cpp``: buckets are allocated when the module is wrapped, and anew, in the
order in which gradients arrived, before the second step's forward pass. A communication hook (``default_hooks.py``)
copies a bucket that is full into 16 bits, reduces the copy, and copies it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice, repeat
from typing import NamedTuple

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.program import (
    Alloc,
    Arrival,
    Collective,
    CollectiveKind,
    Event,
    Free,
    Moment,
    Owner,
    Persistent,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    local,
)
from launchkit.scenario import CommHook, DdpSettings, DeviceKind, Scenario, State
from launchkit.strategies import single
from launchkit.strategies.base import (
    HALF_BYTES,
    arriving_gradients,
    gradient_bytes,
    gradients_die_when_ready,
    located_parameters,
    lora_rank,
    map_layers,
    map_sections,
    next_slot,
    whole_tensors,
    with_ready_gradients,
)
from launchkit.units import MIB

# The first rank sends tensors in flat pieces of this size. Source: torch 2.13
# ``DistributedDataParallel.broadcast_bucket_size``, ``torch/distributed/fsdp/_init_utils.py``.
BROADCAST_BUCKET_BYTES = 250 * MIB

trace_key = single.trace_key


def refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What no single GPU can do either, and torch's bf16 hook over gloo (``default_hooks.py``, confirmed by a run)."""
    is_bf16 = scenario.strategy.ddp.comm_hook is CommHook.BF16
    if is_bf16 and cluster.gpu.device_kind is DeviceKind.CPU:
        return "comm_hook=bf16 wants NCCL, and CPU processes have gloo; use --ddp-settings comm_hook=fp16"
    return single.refusal(scenario, profile, cluster)


def rewrite(program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> StepProgram:
    """Every rank holds everything; gradients exist twice unless they are views of the buckets."""
    buckets = bucket_storages(program, scenario=scenario)
    reduced = map_layers(program, Phase.BACKWARD, _Closings(program, scenario).of_layer, _reduced)
    rewritten = single.rewrite(reduced, scenario=scenario, cluster=cluster)
    if scenario.strategy.ddp.gradient_as_bucket_view:
        rewritten = _without_own_gradients(rewritten)
    arrivals = (Arrival(passing=tuple(broadcast_buckets(_weights(rewritten, scenario=scenario)))),)
    return replace(rewritten, persistent=rewritten.persistent + buckets, arrivals=arrivals)


def _weights(program: StepProgram, *, scenario: Scenario) -> Iterator[int]:
    rank = lora_rank(scenario)
    for place in located_parameters(program):
        yield from repeat(place.parameter.num_bytes(rank), place.copies)


def broadcast_buckets(sizes: Iterable[int]) -> Iterator[int]:
    """Bytes of the pieces in which the first rank sends tensors of ``sizes`` bytes: each is full when the tensor that
    reaches ``BROADCAST_BUCKET_BYTES`` is in it.

    Source: torch 2.13 ``broadcast_coalesced`` in ``torch/csrc/distributed/c10d/comm.cpp``.
    """
    filled = 0
    for size in sizes:
        filled += size
        if filled >= BROADCAST_BUCKET_BYTES:
            yield filled
            filled = 0
    if filled:
        yield filled


def bucket_storages(program: StepProgram, *, scenario: Scenario) -> tuple[Persistent, ...]:
    """The flat buffers, and with ``find_unused_parameters`` the map of what was used."""
    gradients = arriving_gradients(program, rank=lora_rank(scenario))
    sizes = list(assign_buckets(gradients, _limits(scenario)))
    if scenario.strategy.ddp.find_unused_parameters:
        sizes.append(4 * len(whole_tensors(program, scenario=scenario)))  # int32 per parameter
    return tuple(Persistent(Size.constant(size), Owner.COMMUNICATION) for size in sizes)


def _limits(scenario: Scenario) -> tuple[int, ...]:
    return bucket_limits(scenario.strategy.ddp, first_step=scenario.state is State.FIRST)


def bucket_limits(settings: DdpSettings, *, first_step: bool) -> tuple[int, ...]:
    """Bytes at which the first bucket is closed, the second, and (the last limit) every one after.

    Buckets that will be rebuilt in the order of arrival start as a single one; without rebuilding (which
    ``find_unused_parameters`` rules out) they have their final sizes from the start. A cap of one's own holds for the
    first bucket too. Source: ``BucketCapacityConfig`` in ``torch/nn/parallel/distributed.py``.
    """
    if first_step and (settings.static_graph or not settings.find_unused_parameters):
        return ()
    if settings.bucket_cap_bytes != DdpSettings.bucket_cap_bytes:
        return (settings.bucket_cap_bytes,)
    return (settings.first_bucket_bytes, settings.bucket_cap_bytes)


def assign_buckets(gradients: Iterable[tuple[int, int]], limits: tuple[int, ...]) -> Iterator[int]:
    """Bytes of each bucket. A bucket holds one dtype and is closed by the gradient that reaches its limit.

    Source: ``compute_bucket_assignment_by_size`` in ``reducer.cpp``. No limits: one bucket per dtype.
    """
    return (bucket.num_bytes for closed in closings(gradients, limits) for bucket in closed)


class Bucket(NamedTuple):
    num_bytes: int
    itemsize: int

    @property
    def compressed_bytes(self) -> int:
        return self.num_bytes // self.itemsize * HALF_BYTES


def closings(gradients: Iterable[tuple[int, int]], limits: tuple[int, ...]) -> Iterator[tuple[Bucket, ...]]:
    """For each gradient the buckets that it closes; the last one closes all that are left."""
    filled: dict[int, int] = {}
    closed: dict[int, int] = {}
    arrived = list(gradients)
    for left, (itemsize, num_bytes) in zip(range(len(arrived) - 1, -1, -1), arrived, strict=True):
        filled[itemsize] = filled.get(itemsize, 0) + num_bytes
        position = closed.get(itemsize, 0)
        full = limits and filled[itemsize] >= limits[min(position, len(limits) - 1)]
        found = [Bucket(filled.pop(itemsize), itemsize)] if full else []
        closed[itemsize] = position + len(found)
        yield (*found, *(Bucket(size, width) for width, size in filled.items())) if not left else tuple(found)


class _Closings:
    """Hands out, layer by layer in execution order, what a section's gradients close and cost to send."""

    def __init__(self, program: StepProgram, scenario: Scenario) -> None:
        self.rank = lora_rank(scenario)
        self.program = program
        self.compresses = scenario.strategy.ddp.comm_hook is not CommHook.NONE
        self.closings = closings(arriving_gradients(program, rank=self.rank), _limits(scenario))

    def of_layer(self, stage: Stage, layer: int, section: Section) -> _Sent:
        """Omits: a bucket is sent when it is full, not when a layer is done. The bytes are the same; the messages here
        are as many as layers, so that equal layers stay equal. On CUDA the 16-bit copy lives until its message is known
        to have arrived, a little longer than here."""
        if not self.compresses:
            return _Sent(sum(gradient_bytes(self.program, section, rank=self.rank)), ())
        parameters = self.program.groups[section.group].parameters
        num_elements = sum(parameters[event.parameter].numel(self.rank) for event in section.gradients)
        closed = [next(self.closings) for _ in section.gradients]
        copies = tuple(sum(b.compressed_bytes for b in buckets if b.itemsize > HALF_BYTES) for buckets in closed)
        return _Sent(num_elements * HALF_BYTES, copies)


class _Sent(NamedTuple):
    """Bytes that one layer's gradients send, and of the 16-bit copies that are made as each is ready."""

    num_bytes: int
    copies: tuple[int, ...]


def _reduced(stage: Stage, layer: int, section: Section, sent: _Sent) -> Section:
    """``section`` with an all-reduce of what it completes, and the copies that a hook sends instead."""
    if not sent.num_bytes:
        return section
    message = Collective(CollectiveKind.ALL_REDUCE, Size.constant(sent.num_bytes), Moment.AFTER)
    section = replace(section, collectives=(*section.collectives, message))
    return replace(section, events=tuple(_compressed(stage, section, sent))) if any(sent.copies) else section


def _compressed(stage: Stage, section: Section, sent: _Sent) -> Iterator[Event]:
    slot = next_slot(section.events)
    copies = iter(sent.copies)
    for event, ready in with_ready_gradients(section.events):
        yield event
        for num_bytes in islice(copies, len(ready)):
            if num_bytes:
                yield Alloc(slot, Size.constant(num_bytes), Owner.COMMUNICATION)
                yield Free(local(stage.name, slot), Size.constant(num_bytes))


def _without_own_gradients(program: StepProgram) -> StepProgram:
    """``gradient_as_bucket_view``: a gradient is copied into its bucket and becomes a view of it."""
    persistent = tuple(p for p in program.persistent if p.owner is not Owner.GRADIENTS)
    return replace(map_sections(program, Phase.BACKWARD, gradients_die_when_ready), persistent=persistent)
