"""DeepSpeed ZeRO-3: weights, gradients, master weights and states all partitioned, parameter by parameter.

Source: DeepSpeed 0.19.8 ``deepspeed/runtime/zero/stage3.py``, confirmed on timelines of two gloo processes.

- Each parameter is cut into equal parts; those of trainable ones lie in one flat buffer in the compute dtype. Beside it
  lie their fp32 copies in sub-groups of ``sub_group_size``, the states of these, a buffer for the partition's
  gradients, and the bucket of ``reduce_bucket_size`` elements, all from the start of the job to its end.
- Parameters of at most ``stage3_param_persistence_threshold`` elements are gathered after each step and stay.
- The others come and go as ``zero3_fetch`` says.
- A gradient is copied into the bucket and dies; a full bucket is flattened and reduce-scattered.
- The step goes over the sub-groups: gradients flattened, cast to fp32, update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from launchkit.optimizers import FP32_BYTES, LocalTensor
from launchkit.program import (
    Alloc,
    Collective,
    CollectiveKind,
    Copy,
    Event,
    Free,
    FreeAll,
    Moment,
    Owner,
    Parameter,
    Persistent,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    local,
)
from launchkit.scenario import Checkpointing, DeviceKind, Offload, State
from launchkit.strategies.base import (
    OPTIMIZER_STAGE,
    OptimizerStep,
    accumulates,
    map_layers,
    next_slot,
    persistent_run,
    with_optimizer,
    with_ready_gradients,
)
from launchkit.strategies.zero3_fetch import FetchSettings, ModuleUse, PlaceReading, replay
from launchkit.strategies.zero_job import (
    NORM_BYTES,
    REDUCE_STAGE,
    Arrival,
    Bucket,
    EventList,
    Job,
    add_stage,
    host_state_bytes_planned,
    host_state_events,
    last_alloc_freed,
    write_flush,
)
from launchkit.units import divide_up

# DeepSpeed's defaults of the aio swap buffers of an NVMe offload: ``buffer_count`` of ``buffer_size`` elements for
# parameters (deepspeed/runtime/zero/offload_config.py), and as many optimizer buffers as one sub-group needs.
_NVME_PARAM_BUFFERS = 5
_NVME_PARAM_BUFFER_ELEMENTS = 100_000_000
_NVME_OPTIMIZER_BUFFERS = 4


class Gathered(NamedTuple):
    """What each (stage, layer) holds gathered and fetches, in elements."""

    readings: dict[int, PlaceReading]
    places: dict[tuple[str, int], int]

    def at(self, stage: str, layer: int) -> PlaceReading:
        return self.readings.get(self.places[stage, layer], PlaceReading(0, 0))

    def of(self, stage: Stage, layer: int, section: Section) -> PlaceReading:
        """``at``, as ``map_layers`` asks for it."""
        return self.at(stage.name, layer)


def rewrite(job: Job) -> StepProgram:
    """The step of one rank under ZeRO-3."""
    gathered = gather_schedule(job)
    program = _reducing(job, gathered)
    for phase in (Phase.FORWARD, Phase.LOSS):
        program = map_layers(program, phase, gathered.of, lambda *layer: _gathering(job, *layer))
    program = replace(
        program,
        persistent=program.persistent + tuple(_storages(job)),
        host_persistent_bytes=program.host_persistent_bytes + _host_bytes(job),
    )
    return with_optimizer(program, _step(job), scenario=job.scenario, device=job.device)


def _partition(job: Job, numel: int) -> int:
    return divide_up(numel, job.world_size)


def _partitions(job: Job) -> Iterator[int]:
    """Elements of this rank's part of each trainable parameter."""
    return (_partition(job, numel) for numel in job.numels(trainable=True))


def sub_groups(job: Job) -> tuple[int, ...]:
    """Elements of each sub-group: parameters together until ``sub_group_size`` is reached."""
    groups: list[int] = []
    filled = 0
    for numel in _partitions(job):
        filled += numel
        if filled >= job.settings.sub_group_size:
            groups.append(filled)
            filled = 0
    return (*groups, filled) if filled else tuple(groups)


def _has_recorded(job: Job) -> bool:
    """Whether an earlier pass has told the coordinator the order of modules; until then it keeps nothing gathered."""
    return job.scenario.state is State.STEADY or accumulates(job.scenario)


def is_persistent(job: Job, numel: int) -> bool:
    return numel <= job.settings.stage3_param_persistence_threshold


def _persistent_numels(job: Job) -> Iterator[int]:
    for trainable in (True, False):
        yield from (numel for numel in job.numels(trainable=trainable) if is_persistent(job, numel))


def _storages(job: Job) -> Iterator[Persistent]:
    """What the device holds between steps."""
    partition = sum(_partitions(job))
    if not job.scenario.strategy.offload.params:
        yield Persistent(Size.constant(partition * job.itemsize), Owner.WEIGHTS)
        frozen = (_partition(job, numel) * job.itemsize for numel in job.numels(trainable=False))
        yield from persistent_run(frozen, Owner.WEIGHTS)
    if _has_recorded(job):
        gathered = (numel * job.itemsize for numel in _persistent_numels(job))
        yield from persistent_run(gathered, Owner.GATHERED_WEIGHTS)
    yield Persistent(Size.constant(job.settings.reduce_bucket_size * job.itemsize), Owner.COMMUNICATION)
    if not job.offloads_optimizer:
        yield Persistent(Size.constant(partition * job.itemsize), Owner.GRADIENTS)
        yield from persistent_run((numel * job.master_itemsize for numel in sub_groups(job)), Owner.MASTER_WEIGHTS)


def _host_bytes(job: Job) -> int:
    """Offloaded optimizer and parameters; under NVMe only the buffers that they pass through."""
    partition = sum(_partitions(job))
    if job.scenario.strategy.offload is Offload.NVME:
        parameters = _NVME_PARAM_BUFFERS * _NVME_PARAM_BUFFER_ELEMENTS * job.itemsize
        return parameters + _NVME_OPTIMIZER_BUFFERS * max(sub_groups(job)) * FP32_BYTES + partition * job.itemsize
    total = 0
    if job.offloads_optimizer:
        masters_and_gradients = 2 * sum(job.pinned_bytes(numel * FP32_BYTES) for numel in sub_groups(job))
        total += masters_and_gradients + host_state_bytes_planned(job, partition) + partition * job.itemsize
    if job.scenario.strategy.offload.params:
        frozen = sum(_partition(job, numel) for numel in job.numels(trainable=False))
        total += (partition + frozen) * job.itemsize
    return total


def gather_schedule(job: Job) -> Gathered:
    """Replays the coordinator over the step's modules, in the order in which they run."""
    weights: dict[tuple[str, int, int], int] = {}
    numels: list[int] = []
    uses = [ModuleUse(-1, ())]  # the model itself runs first, and prefetches
    places: dict[tuple[str, int], int] = {}
    modules: dict[tuple[str, int], list[tuple[int, ...]]] = {}  # by stage and section, shared by layers alike
    for stage in job.program.stages:
        for layer in stage.order():
            place = places[stage.name, layer] = len(places)
            forward = _forward_section(job, stage, layer)
            if (stage.name, forward) not in modules:
                modules[stage.name, forward] = _modules(job, stage, job.program.sections[forward])
            for module in modules[stage.name, forward]:
                numbers = tuple(_number(job, weights, numels, stage, layer, index) for index in module)
                uses.append(ModuleUse(place, numbers))
    settings = FetchSettings(
        prefetch_elements=job.settings.stage3_prefetch_bucket_size,
        max_live_elements=job.settings.stage3_max_live_parameters,
        max_reuse_elements=job.settings.stage3_max_reuse_distance,
        world_size=job.world_size,
    )
    return Gathered(replay(uses, numels, settings, recorded=_has_recorded(job)), places)


def _number(
    job: Job, weights: dict[tuple[str, int, int], int], numels: list[int], stage: Stage, layer: int, index: int
) -> int:
    """The number of a weight: one per parameter of each layer of a stack, one per parameter of the root."""
    group = job.program.section_of(stage, layer).group
    key = (stage.stack, layer, index) if stage.stack else (group, 0, index)
    if key not in weights:
        weights[key] = len(numels)
        numels.append(job.program.groups[group].parameters[index].numel(job.rank))
    return weights[key]


def _forward_section(job: Job, stage: Stage, layer: int) -> int:
    """The number of the section whose weights a layer uses: the forward pass's, which names them."""
    forward_name = stage.name.replace("backward", "forward", 1)
    forward = next((other for other in job.program.stages if other.name == forward_name), stage)
    return forward.layers[min(layer, len(forward.layers) - 1)]


def _modules(job: Job, stage: Stage, section: Section) -> list[tuple[int, ...]]:
    """The modules with gathered weights that ``section`` runs, each as indices of its group's parameters.

    A backward pass runs them in reverse, after a forward pass again where activations are checkpointed.
    """
    parameters = job.program.groups[section.group].parameters
    modules: dict[str, list[int]] = {}
    for index in section.uses:
        if not (_has_recorded(job) and is_persistent(job, parameters[index].numel(job.rank))):
            modules.setdefault(_module_name(parameters[index]), []).append(index)
    order = [tuple(indices) for indices in modules.values()]
    if stage.phase is not Phase.BACKWARD:
        return order
    again = order if stage.stack and job.scenario.training.checkpointing is not Checkpointing.NONE else []
    return again + order[::-1]


def _module_name(parameter: Parameter) -> str:
    return parameter.name.rpartition(".")[0]


def _gathering(job: Job, stage: Stage, layer: int, section: Section, reading: PlaceReading) -> Section:
    """``section`` with its gathered weights around it.

    Omits: where inside a layer each module's weights come and go; the most that any of its modules sees is held
    throughout.
    """
    if not reading.peak:
        return section
    slot = next_slot(section.events)
    size = Size.constant(reading.peak * job.itemsize)
    events = (
        Alloc(slot, size, Owner.GATHERED_WEIGHTS),
        *section.events,
        Free(local(stage.name, slot), size),
    )
    return replace(section, events=events, collectives=section.collectives + _all_gather(job, reading.fetched))


def _all_gather(job: Job, fetched: int) -> tuple[Collective, ...]:
    if not fetched or job.world_size == 1:
        return ()
    return (Collective(CollectiveKind.ALL_GATHER, Size.constant(fetched * job.itemsize), Moment.BEFORE),)


def _reducing(job: Job, gathered: Gathered) -> StepProgram:
    """The backward pass: gathered weights, gradients into the bucket, full buckets scattered."""
    bucket = Bucket(job.settings.reduce_bucket_size)

    def decide(stage: Stage, layer: int, section: Section) -> tuple[tuple[Arrival, ...], int, PlaceReading]:
        gradients = job.arriving(stage, layer)
        numel = sum([gradient.numel for gradient in gradients])
        return tuple([bucket.take(gradient) for gradient in gradients]), numel, gathered.at(stage.name, layer)

    def change(
        stage: Stage, layer: int, section: Section, decision: tuple[tuple[Arrival, ...], int, PlaceReading]
    ) -> Section:
        arrivals, numel, reading = decision
        reduced = replace(
            section,
            events=_bucketed(job, stage, section, arrivals),
            collectives=section.collectives + _reduce_scatter(job, numel),
            copies=section.copies + _gradients_to_host(job, numel),
        )
        return _gathering(job, stage, layer, reduced, reading)

    program = map_layers(job.program, Phase.BACKWARD, decide, change)
    events = EventList(REDUCE_STAGE)
    # The last hook flushes the bucket while the weights of the last module are still there.
    held = events.alloc(_last_gathered(job, gathered) * job.itemsize, Owner.GATHERED_WEIGHTS)
    write_flush(events, bucket.flush(), itemsize=job.itemsize, copies=_scatter_copies(job))
    events.events.append(held)
    return add_stage(program, REDUCE_STAGE, Section(events=tuple(events.events)))


def _bucketed(job: Job, stage: Stage, section: Section, arrivals: Iterable[Arrival]) -> tuple[Event, ...]:
    """The events of ``section`` with what its gradients do as they arrive."""
    events = EventList(stage.name, slot=next_slot(section.events))
    following = iter(arrivals)
    for event, ready in with_ready_gradients(section.events):
        events.events.append(event)
        for alloc in ready:
            flush, is_copied = next(following)
            if flush is not None:
                write_flush(events, flush, itemsize=job.itemsize, copies=_scatter_copies(job))
            if is_copied:
                events.events.append(Free(local(stage.name, alloc.slot), alloc.size))
    return tuple(events.events)


def _last_gathered(job: Job, gathered: Gathered) -> int:
    stage = next(stage for stage in reversed(job.program.stages) if stage.phase is Phase.BACKWARD)
    return gathered.at(stage.name, list(stage.order())[-1]).peak


def _scatter_copies(job: Job) -> int:
    """The flat copy that is scattered; gloo makes another of it."""
    return 2 if job.device is DeviceKind.CPU else 1


def _reduce_scatter(job: Job, numel: int) -> tuple[Collective, ...]:
    if not numel or job.world_size == 1:
        return ()
    return (Collective(CollectiveKind.REDUCE_SCATTER, Size.constant(numel * job.itemsize), Moment.AFTER),)


def _gradients_to_host(job: Job, numel: int) -> tuple[Copy, ...]:
    if not numel or not job.offloads_optimizer:
        return ()
    return (Copy(False, Size.constant(_partition(job, numel) * FP32_BYTES), Moment.AFTER),)


def _step(job: Job) -> OptimizerStep:
    """The update, sub-group by sub-group, and the gathering of what stays gathered."""
    persistent = tuple(_persistent_numels(job))
    gathers = _blocking_gather(job, sum(persistent))
    if job.offloads_optimizer:
        partition_bytes = Size.constant(sum(_partitions(job)) * job.itemsize)
        copies = () if job.scenario.strategy.offload.params else (Copy(True, partition_bytes, Moment.BLOCKING),)
        states = host_state_events(job, sum(_partitions(job)))
        return OptimizerStep(tensors=(), on_host=True, before=states, collectives=gathers, copies=copies)
    before = _fp32_gradients(job)
    return OptimizerStep(
        tensors=tuple(LocalTensor((numel,), job.master_itemsize) for numel in sub_groups(job)),
        before=before,
        after=(last_alloc_freed(before), *_regathered(job, persistent, slot=next_slot(before))),
        collectives=gathers,
        zeroes_gradients=False,
    )


def _fp32_gradients(job: Job) -> tuple[Event, ...]:
    """Persistent weights are let go; norms are taken in fp64; the largest sub-group's gradients are flattened and cast.

    Omits: sub-groups follow one another, so that fewer than all of them are cast at a time; the largest one is here.
    """
    events = EventList(OPTIMIZER_STAGE)
    events.events.append(FreeAll(Owner.GATHERED_WEIGHTS))
    events.passing(max(_partitions(job)) * NORM_BYTES, Owner.TEMPORARIES)
    numel = max(sub_groups(job))
    flat = events.alloc(numel * job.itemsize, Owner.TEMPORARIES)
    if job.itemsize != job.master_itemsize:
        events.alloc(numel * job.master_itemsize, Owner.TEMPORARIES)
        events.events.append(flat)
    return tuple(events.events)


def _regathered(job: Job, numels: Iterable[int], *, slot: int) -> tuple[Event, ...]:
    events = EventList(OPTIMIZER_STAGE, slot=slot)
    for numel in numels:
        events.alloc(numel * job.itemsize, Owner.GATHERED_WEIGHTS)
    return tuple(events.events)


def _blocking_gather(job: Job, numel: int) -> tuple[Collective, ...]:
    if not numel or job.world_size == 1:
        return ()
    return (Collective(CollectiveKind.ALL_GATHER, Size.constant(numel * job.itemsize), Moment.BLOCKING),)
