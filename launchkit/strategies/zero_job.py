"""What the rewrites of the ZeRO stages share: the job's numbers, events in the making, the reduce bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from launchkit.hardware import Cluster
from launchkit.optimizers import FP32_BYTES, LocalTensor, find
from launchkit.program import (
    Alloc,
    Anchor,
    Event,
    Free,
    Owner,
    Persistent,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    TensorRef,
    local,
)
from launchkit.scenario import DeviceKind, Precision, Scenario, State, ZeroSettings
from launchkit.strategies.base import OPTIMIZER_STAGE, is_gradient, located_parameters, lora_rank

REDUCE_STAGE = "backward.reduce"
NORM_BYTES = 8  # gradient norms are taken in fp64


class GradientRef(NamedTuple):
    """A parameter's gradient: where it is allocated, its size, its elements."""

    ref: TensorRef
    size: Size
    numel: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program with the numbers that every step of its rewrite needs."""

    program: StepProgram
    scenario: Scenario
    world_size: int
    device: DeviceKind

    @classmethod
    def of(cls, program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> Job:
        return cls(program=program, scenario=scenario, world_size=cluster.num_gpus, device=cluster.gpu.device_kind)

    @property
    def settings(self) -> ZeroSettings:
        return self.scenario.strategy.zero

    @property
    def rank(self) -> int:
        return lora_rank(self.scenario)

    @property
    def itemsize(self) -> int:
        """Bytes per element of weights, gradients and buckets: the compute dtype's."""
        return FP32_BYTES if self.scenario.training.precision is Precision.FP32 else 2

    @property
    def offloads_optimizer(self) -> bool:
        return self.scenario.strategy.offload.optimizer

    @property
    def overlap_comm(self) -> bool:
        """DeepSpeed's own default is on at stage 3 and off below."""
        chosen = self.settings.overlap_comm
        return self.scenario.strategy.kind.zero_stage == 3 if chosen is None else chosen

    def numels(self, *, trainable: bool) -> Iterator[int]:
        """Elements of each parameter of every layer."""
        for place in located_parameters(self.program, trainable=trainable):
            for _ in range(place.copies):
                yield place.parameter.numel(self.rank)

    def gradients(self) -> Iterator[GradientRef]:
        """Every parameter's gradient in the order in which the backward pass completes them."""
        for stage in self.program.stages:
            if stage.phase is Phase.BACKWARD:
                for layer in stage.order():
                    section = self.program.section_of(stage, layer)
                    for event in filter(is_gradient, section.events):
                        yield gradient_ref(self, stage, layer, section, event)


def gradient_ref(job: Job, stage: Stage, layer: int, section: Section, event: Alloc) -> GradientRef:
    parameter = job.program.groups[section.group].parameters[event.parameter]
    ref = TensorRef(stage.name, Anchor.FIRST, layer, event.slot)
    return GradientRef(ref, event.size, parameter.numel(job.rank))


class EventList:
    """Events of one section in the making, with slots given out from ``slot`` on."""

    def __init__(self, stage: str, *, slot: int = 0) -> None:
        self.events: list[Event] = []
        self._stage = stage
        self._slot = slot

    def alloc(self, num_bytes: int, owner: Owner) -> Free:
        """Allocates, and returns the event that frees it again in this section."""
        size = Size.constant(num_bytes)
        self.events.append(Alloc(self._slot, size, owner))
        self._slot += 1
        return Free(local(self._stage, self._slot - 1), size)

    def passing(self, num_bytes: int, owner: Owner) -> None:
        """Allocates and frees at once."""
        if num_bytes:
            self.events.append(self.alloc(num_bytes, owner))

    @property
    def last_slot(self) -> int:
        return self._slot - 1


class Bucket:
    """The reduce bucket of one backward pass: which gradients fit, and when it is flushed.

    A gradient larger than the bucket is not copied: it stays until the next one comes, and is reduced by itself.
    """

    def __init__(self, capacity: int, *, itemsize: int) -> None:
        self.capacity = capacity
        self.itemsize = itemsize
        self.elements = 0
        self.oversized: list[GradientRef] = []

    def flushes_before(self, numel: int) -> bool:
        return self.elements > 0 and self.elements + numel > self.capacity

    def take(self, gradient: GradientRef) -> bool:
        """Adds a gradient; false when it is too large to be copied, so that it stays."""
        self.elements += gradient.numel
        if gradient.numel > self.capacity:
            self.oversized.append(gradient)
            return False
        return True

    def flush(self, events: EventList, *, copies: int = 1) -> None:
        """Reduces what there is: a flat copy of it (``copies`` of them where the backend makes its own)."""
        frees = [events.alloc(self.elements * self.itemsize, Owner.COMMUNICATION) for _ in range(copies)]
        events.events.extend(reversed(frees))
        events.events.extend(Free(gradient.ref, gradient.size) for gradient in self.oversized)
        self.oversized.clear()
        self.elements = 0


def frozen_weights(job: Job) -> Iterator[Persistent]:
    """Weights that are not trained stay as they are, with the scales of 4-bit ones."""
    for place in located_parameters(job.program, trainable=False):
        parameter = place.parameter
        num_bytes = parameter.packed_bytes or parameter.numel(job.rank) * job.itemsize
        yield Persistent(Size.constant(num_bytes), Owner.WEIGHTS, place.copies)
        if parameter.extra_bytes:
            yield Persistent(Size.constant(parameter.extra_bytes), Owner.WEIGHTS, place.copies)


def host_optimizer_bytes(job: Job, numel: int) -> int:
    """Pinned host memory of an offloaded optimizer over ``numel`` elements: master weights, gradients and states in
    fp32."""
    states = 0 if makes_host_states(job) else host_state_bytes(job, numel)
    return 2 * numel * FP32_BYTES + states


def host_state_bytes(job: Job, numel: int) -> int:
    tensor = LocalTensor((numel,), FP32_BYTES)
    return sum(find(job.scenario.training.optimizer).state_bytes(tensor, device=DeviceKind.CPU))


def makes_host_states(job: Job) -> bool:
    """Whether the step itself makes offloaded states in the memory that is planned: the first step on a CPU."""
    return job.offloads_optimizer and job.device is DeviceKind.CPU and job.scenario.state is State.FIRST


def host_state_events(job: Job, numel: int) -> tuple[Event, ...]:
    if not makes_host_states(job):
        return ()
    events = EventList(OPTIMIZER_STAGE)
    events.alloc(host_state_bytes(job, numel), Owner.OPTIMIZER_STATES)
    return tuple(events.events)


def add_stage(program: StepProgram, name: str, section: Section) -> StepProgram:
    """``program`` with one more stage of the backward phase behind it."""
    stage = Stage(name=name, phase=Phase.BACKWARD, layers=(len(program.sections),))
    return replace(program, stages=(*program.stages, stage), sections=(*program.sections, section))


def last_alloc_freed(events: Sequence[Event]) -> Free:
    alloc = next(event for event in reversed(events) if isinstance(event, Alloc))
    return Free(local(OPTIMIZER_STAGE, alloc.slot), alloc.size)
