"""What the rewrites of the ZeRO stages share: the job's numbers, events in the making, the reduce bucket."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from launchkit.hardware import Cluster
from launchkit.optimizers import FP32_BYTES, LocalTensor, find
from launchkit.program import (
    Alloc,
    Anchor,
    Event,
    Free,
    Owner,
    Parameter,
    Persistent,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    Stream,
    TensorRef,
    local,
)
from launchkit.scenario import DeviceKind, Precision, Scenario, State, Trainer, ZeroSettings
from launchkit.strategies.base import OPTIMIZER_STAGE, ROOT_GROUP, located_parameters, lora_rank
from launchkit.units import divide_up

REDUCE_STAGE = "backward.reduce"
NORM_BYTES = 8  # gradient norms are taken in fp64


# A parameter by the stack it is in (or ROOT_GROUP), the layer there and its index in the section's group.
ParameterKey = tuple[str, int, int]

# What the Hugging Face Trainer takes weight decay off: ``Trainer.get_decay_parameter_names``, transformers 5.23. It
# asks for the class of a norm as well; the vectors among its parameters say the same.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class Placed(NamedTuple):
    """A trainable parameter and its elements."""

    key: ParameterKey
    numel: int


class GradientRef(NamedTuple):
    """A parameter's gradient: where it is allocated, its size, its elements, whose it is."""

    ref: TensorRef
    size: Size
    numel: int
    key: ParameterKey


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
    def num_shards(self) -> int:
        """Ranks that share the weights under stage 3: all, or as many as MiCS puts into a group."""
        return self.settings.mics_shard_size or self.world_size

    @cached_property
    def rank(self) -> int:
        return lora_rank(self.scenario)

    @property
    def itemsize(self) -> int:
        """Bytes per element of weights, gradients and buckets: the compute dtype's."""
        return FP32_BYTES if self.scenario.training.precision is Precision.FP32 else 2

    @property
    def master_itemsize(self) -> int:
        """Bytes per element of master weights and states: fp32's, unless these are in bf16 too."""
        return self.itemsize if self.scenario.training.has_bf16_masters else FP32_BYTES

    @property
    def sent_itemsize(self) -> int:
        """Bytes per element of a gradient on its way: where ranks share sequences, fp32's.

        Source: ``seq_parallel_communication_data_type`` in DeepSpeed 0.19.8 ``runtime/config.py``, engine.py.
        """
        return FP32_BYTES if self.scenario.strategy.split.sp > 1 else self.itemsize

    @property
    def widens_sent(self) -> bool:
        return self.sent_itemsize > self.itemsize

    @property
    def pins_memory(self) -> bool:
        return self.settings.offload_pin_memory and self.device is not DeviceKind.CPU

    def pinned_bytes(self, num_bytes: int) -> int:
        """Host memory that a page-locked buffer takes: torch's host allocator rounds up to a power of two.

        Source: ``CachingHostAllocatorImpl::allocate`` in ATen/core/CachingHostAllocator.h, torch 2.13. A CPU build of
        torch pins nothing.
        """
        if not self.pins_memory:
            return num_bytes
        return 1 << max(0, num_bytes - 1).bit_length()

    @property
    def offloads_optimizer(self) -> bool:
        return self.scenario.strategy.offload.optimizer

    @property
    def overlap_comm(self) -> bool:
        """DeepSpeed's own default is on at stage 3 and off below."""
        chosen = self.settings.overlap_comm
        return self.scenario.strategy.kind.zero_stage == 3 if chosen is None else chosen

    @property
    def gather_stream(self) -> Stream:
        """Where stage 3 allocates what it gathers. Source: ``__allgather_stream`` in parameter_offload.py, under which
        ``fetch_sub_module`` both gathers (``all_gather_coalesced``) and copies out what has arrived (``wait``)."""
        return Stream.GATHER if self.overlap_comm else Stream.COMPUTE

    @property
    def reduce_stream(self) -> Stream:
        """Where a full bucket is flattened, reduced and moved on. Source: ``reduce_and_partition_stream`` in stage3.py,
        ``reduction_stream`` in stage_1_and_2.py (``average_tensor``, ``allreduce_and_copy``, ``reduce_ipg_grads``)."""
        return Stream.REDUCE if self.overlap_comm else Stream.COMPUTE

    def numels(self, *, trainable: bool) -> tuple[int, ...]:
        """Elements of each parameter of every layer."""
        return self._trainable_numels if trainable else self._frozen_numels

    @cached_property
    def _trainable_numels(self) -> tuple[int, ...]:
        return tuple(self._numels(trainable=True))

    @cached_property
    def _frozen_numels(self) -> tuple[int, ...]:
        return tuple(self._numels(trainable=False))

    def _numels(self, *, trainable: bool) -> Iterator[int]:
        for place in located_parameters(self.program, trainable=trainable):
            yield from [place.parameter.numel(self.rank)] * place.copies

    @cached_property
    def partitions(self) -> tuple[int, ...]:
        """Elements of a stage 3 rank's part of each trainable parameter."""
        return tuple([divide_up(numel, self.num_shards) for group in self.optimizer_groups for _, numel in group])

    @cached_property
    def largest_block_weight(self) -> int:
        """Elements of the largest parameter inside the stacks, or outside where there are none."""
        groups = [group for name, group in self.program.groups.items() if name != ROOT_GROUP]
        return max(
            parameter.numel(self.rank)
            for group in groups or self.program.groups.values()
            for parameter in group.parameters
        )

    @cached_property
    def optimizer_groups(self) -> tuple[tuple[Placed, ...], ...]:
        """Trainable parameters as the optimizer has them: in the model's order, and in the Trainer's two groups, with
        and without weight decay. DeepSpeed drops a group without parameters."""
        groups: tuple[list[Placed], list[Placed]] = ([], [])
        split = self.scenario.training.trainer is not Trainer.LOOP
        known: dict[int, tuple[bool, int]] = {}  # by identity: layers alike share their parameters
        for key, parameter in self._in_model_order().items():
            if parameter.trainable:
                if id(parameter) not in known:
                    undecayed = split and (len(parameter.shape) == 1 or bool(_NO_DECAY.search(parameter.name.lower())))
                    known[id(parameter)] = (undecayed, parameter.numel(self.rank))
                undecayed, numel = known[id(parameter)]
                groups[undecayed].append(Placed(key, numel))
        return tuple(tuple(group) for group in groups if group)

    def _in_model_order(self) -> dict[ParameterKey, Parameter]:
        """Every parameter: what is used outside the stacks in the order of its first use, a stack's where it runs."""
        found: dict[ParameterKey, Parameter] = {}
        for stage in self.program.stages:
            if stage.phase in (Phase.FORWARD, Phase.LOSS):
                for layer in range(len(stage.layers)):
                    section = self.program.section_of(stage, layer)
                    parameters = self.program.groups[section.group].parameters
                    for index in range(len(parameters)) if stage.stack else section.uses:
                        found.setdefault(parameter_key(stage, layer, index), parameters[index])
        root = self.program.groups.get(ROOT_GROUP)
        for index, parameter in enumerate(root.parameters if root else ()):
            found.setdefault((ROOT_GROUP, 0, index), parameter)
        return found

    @cached_property
    def _arriving(self) -> dict[int, tuple[tuple[int, Size, int, int], ...]]:
        """By section: slot, size, elements and parameter of each gradient that it completes, in order."""
        numels = {
            name: tuple(parameter.numel(self.rank) for parameter in group.parameters)
            for name, group in self.program.groups.items()
        }
        return {
            number: tuple(
                (slot, size, numels[section.group][index], index) for slot, size, _, index, *_ in section.gradients
            )
            for number, section in enumerate(self.program.sections)
        }

    def arriving(self, stage: Stage, layer: int) -> tuple[GradientRef, ...]:
        """The gradients that a layer of one of ``program``'s stages completes, in order."""
        rows = self._arriving[stage.layers[layer]]
        return tuple(
            [
                GradientRef(
                    TensorRef(stage.name, Anchor.FIRST, layer, slot), size, numel, parameter_key(stage, layer, index)
                )
                for slot, size, numel, index in rows
            ]
        )

    def gradients(self) -> Iterator[GradientRef]:
        """Every parameter's gradient in the order in which the backward pass completes them."""
        for stage in self.program.stages:
            if stage.phase is Phase.BACKWARD:
                for layer in stage.order():
                    yield from self.arriving(stage, layer)


def parameter_key(stage: Stage, layer: int, index: int) -> ParameterKey:
    return (stage.stack, layer, index) if stage.stack else (ROOT_GROUP, 0, index)


class EventList:
    """Events of one section in the making, with slots given out from ``slot`` on."""

    def __init__(self, stage: str, *, slot: int = 0) -> None:
        self.events: list[Event] = []
        self._stage = stage
        self._slot = slot

    def alloc(self, num_bytes: int, owner: Owner, *, stream: Stream = Stream.COMPUTE) -> Free:
        """Allocates, and returns the event that frees it again in this section."""
        size = Size.constant(num_bytes)
        self.events.append(Alloc(self._slot, size, owner, stream=stream))
        self._slot += 1
        return Free(local(self._stage, self._slot - 1), size)

    def passing(self, num_bytes: int, owner: Owner, *, stream: Stream = Stream.COMPUTE) -> None:
        """Allocates and frees at once."""
        if num_bytes:
            self.events.append(self.alloc(num_bytes, owner, stream=stream))


def frozen_weights(job: Job) -> Iterator[Persistent]:
    """Weights that are not trained stay as they are, with the scales of 4-bit ones."""
    for place in located_parameters(job.program, trainable=False):
        parameter = place.parameter
        num_bytes = parameter.packed_bytes or parameter.numel(job.rank) * job.itemsize
        yield Persistent(Size.constant(num_bytes), Owner.WEIGHTS, place.copies)
        if parameter.extra_bytes:
            yield Persistent(Size.constant(parameter.extra_bytes), Owner.WEIGHTS, place.copies)


def host_state_bytes_planned(job: Job, numel: int) -> int:
    """Host memory of an offloaded optimizer's states, in fp32, where the step begins with them."""
    return 0 if makes_host_states(job) else host_state_bytes(job, numel)


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
