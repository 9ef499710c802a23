"""FSDP2 (``fully_shard``): every parameter sharded on its first dimension, gathered unit by unit.

A *unit* is what one ``fully_shard`` call gathers and reduces together: a block, or what no block holds. One life of a
unit, as torch 2.13 has it (``torch/distributed/fsdp/_fully_shard``, confirmed on timelines of two gloo processes):

- gather: shards are cast into a flat input where the compute dtype differs, all-gathered into one buffer, and copied
  out into a storage per parameter. In the forward pass the buffer lives until the next unit has been copied out (the
  last one's until the root's forward ends); in the backward pass it dies at once. Those of torchao's layers that go
  in 8 bits are scaled and cast before, one after another.
- after its forward the copies die, except those of a unit that is not resharded (the root's never are).
- before its backward the unit is gathered again, if the prefetch has not done so: each unit's backward begins by
  gathering the next one's, so two are there at a time.
- after its backward the copies die, then the previous unit's reduce input; the gradients are copied into this
  unit's reduce input and die, all but the unit's last, and the reduced shard, in the dtype of the shards, becomes the
  gradient; then the last one dies too.

The gather's buffers and what a reduction puts out are made on streams of their own, the rest on the one that computes.
torch keeps each until an event says that it is no longer read, so that none lags.

Shards are padded to equal size, so the first rank is the largest. On CPU the gloo backend copies what it is given: one
more buffer of the collective's size, for the time of the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.optimizers import FP32_BYTES, LocalTensor, find
from launchkit.program import (
    Alloc,
    Arrival,
    Collective,
    CollectiveKind,
    Copy,
    Event,
    Free,
    Group,
    Kernel,
    Moment,
    Owner,
    Parameter,
    Persistent,
    Phase,
    Size,
    StepProgram,
    Stream,
    TensorRef,
)
from launchkit.scenario import (
    Compute,
    DeviceKind,
    Loss,
    Method,
    Offload,
    Precision,
    Scenario,
    Sharding,
    Strategy,
    StrategyKind,
    TraceKey,
    Trainer,
    Training,
)
from launchkit.strategies.base import (
    FLOAT8_BYTES,
    HALF_BYTES,
    ROOT_GROUP,
    OptimizerStep,
    accumulates,
    gradients_die_when_ready,
    lora_rank,
    make_trace_key,
    map_sections,
    persistent_run,
    with_an_end,
    with_optimizer,
)
from launchkit.strategies.frames import Frame, FramedProgram, Live, Place, Visit
from launchkit.units import divide_up

WIRE_SLOT = 4  # of the copy on the wire, among the slots that a rewrite uses

# Gathered weights are 16-bit already. What accelerate's ``prepare_model`` wraps computes under autocast all the same.
_UNDER_AUTOCAST = {
    Precision.FP32: Compute.FP32,
    Precision.FP16: Compute.FP16_AUTOCAST,
    Precision.BF16: Compute.BF16_AUTOCAST,
    Precision.BF16_PARAMS: Compute.BF16_AUTOCAST,
    Precision.BF16_PURE: Compute.BF16,
    Precision.FP8: Compute.FP8_AUTOCAST,
}
_COMPUTE = _UNDER_AUTOCAST | {
    Precision.FP16: Compute.FP16,
    Precision.BF16: Compute.BF16,
    Precision.BF16_PARAMS: Compute.BF16,
}


def trace_key(training: Training, strategy: Strategy, device: DeviceKind, *, single_sequence: bool = False) -> TraceKey:
    """Blocks run on gathered weights, so on 16-bit ones, adapters included, under mixed precision.

    Nothing wraps the forward pass in autocast: accelerate 1.15 does so in ``prepare_model``, which ``_prepare_fsdp2``
    does not call (confirmed in a run under the Trainer), unless transformers shards the model itself, beside ``--tp``.
    Omits: beside 4-bit weights and torchao's layers the trace has autocast nevertheless, which widens layer norms.
    """
    is_wrapped = strategy.split.tp > 1 or training.method is Method.QLORA
    compute = compute_of_gathered(training) if is_wrapped else _without_autocast(training)
    return key_of_gathered(training, strategy, device, compute=compute, single_sequence=single_sequence)


def compute_of_gathered(training: Training) -> Compute:
    """What blocks compute in where the forward pass is wrapped in autocast; the plain loop has it around bf16 weights
    that are stored so, and not around those that are cast to be gathered."""
    if training.trainer is Trainer.LOOP and training.precision is not Precision.BF16_PARAMS:
        return _COMPUTE[training.precision]
    return _UNDER_AUTOCAST[training.precision]


def _without_autocast(training: Training) -> Compute:
    return compute_of_gathered(training) if training.trainer is Trainer.LOOP else _COMPUTE[training.precision]


def key_of_gathered(
    training: Training, strategy: Strategy, device: DeviceKind, *, compute: Compute, single_sequence: bool
) -> TraceKey:
    """The key of the program in which blocks run on gathered weights, and compute as ``compute``."""
    key = make_trace_key(training, compute, device, single_sequence=single_sequence)
    return replace(
        key,
        cast_adapters=training.method is not Method.FULL and _casts(training),
        gathers_float8=key.compute.is_float8 and strategy.fsdp.float8_all_gather,
    )


def _casts(training: Training) -> bool:
    """Whether ``fully_shard`` is given a 16-bit policy: accelerate does so whenever autocast is on."""
    in_loop = training.trainer is Trainer.LOOP
    return training.precision.is_mixed or (training.precision is Precision.BF16_PARAMS and not in_loop)


def refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What ``fully_shard`` or accelerate's use of it cannot do, with what to type instead."""
    training, strategy = scenario.training, scenario.strategy
    if strategy.offload in (Offload.OPTIMIZER, Offload.NVME):
        return (
            f"--offload {strategy.offload} is DeepSpeed's; FSDP moves parameters and optimizer together, "
            "use --offload all"
        )
    if strategy.fsdp.sharding is Sharding.NO_SHARD:
        return "--fsdp-sharding no_shard shards nothing; use --strategy ddp, which is the same"
    if training.optimizer.endswith("8bit") and "torch" not in training.optimizer:
        return (
            f"--optimizer {training.optimizer} cannot step on FSDP's sharded tensors; use adamw_torch_fused "
            "or adamw_torch_8bit"
        )
    if (
        training.precision is Precision.BF16_PARAMS
        and training.method is Method.FULL
        and training.trainer is not Trainer.LOOP
    ):
        return (
            "--precision bf16-params does not exist under accelerate's FSDP, which keeps trainable weights in fp32 "
            "when autocast is on; use --precision bf16 or bf16-pure"
        )
    return _group_refusal(scenario, cluster)


def _group_refusal(scenario: Scenario, cluster: Cluster) -> str | None:
    size = shard_group_size(scenario.strategy, cluster)
    if num_sharing_ranks(scenario.strategy, cluster) % size:
        return f"a shard group of {size} GPUs does not divide {cluster.num_gpus}; choose a divisor"
    return None


def is_hybrid(strategy: Strategy) -> bool:
    return strategy.kind is StrategyKind.HSDP or strategy.fsdp.sharding.is_hybrid


def num_sharing_ranks(strategy: Strategy, cluster: Cluster) -> int:
    """Ranks that hold the same matrices, so that FSDP may shard them: all but for tensor parallelism.

    Ranks that share a sequence are among them: accelerate shards over ``dp_shard`` and ``cp`` as one.
    """
    return max(1, cluster.num_gpus // strategy.split.tp)


def shard_group_size(strategy: Strategy, cluster: Cluster) -> int:
    """Ranks that share one copy of the model: all, or under hybrid sharding one node's unless told otherwise."""
    num_ranks = num_sharing_ranks(strategy, cluster)
    if not is_hybrid(strategy):
        return num_ranks
    in_node = max(1, cluster.node.num_gpus // strategy.split.tp)
    return min(strategy.fsdp.shard_group_size or in_node, num_ranks)


def rewrite(program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> StepProgram:
    """What the first rank, the largest, does in a step."""
    program, layout = with_an_end(program), Layout.of(scenario, cluster)
    units = _units(program, layout)
    rewritten = _Rewriter(program, layout, units).run()
    parameters = [p for unit, count in _counted(program, units) for _ in range(count) for p in unit.parameters]
    return _with_state(rewritten, parameters, units, layout, scenario=scenario, cluster=cluster)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one scenario shards and in which dtypes, as numbers. Item sizes of 0 mean the parameter's own."""

    num_shards: int
    num_replicas: int
    crosses_groups: bool  # the ranks that shard are not all there are: others hold other parts of the matrices
    rank: int
    trainable_itemsize: int
    frozen_itemsize: int
    gathered_itemsize: int
    reduced_itemsize: int
    reshards: bool
    has_root_unit: bool  # the plain loop wraps all that is outside blocks as one; accelerate carves it up
    calls_head: bool  # a fused head is read, not called: its unit's backward begins with the loss
    accumulates: bool
    defers_reduction: bool  # accelerate's no_sync: whole gradients pile up until the last micro-batch
    offloads: bool
    copies_on_wire: bool  # gloo

    @classmethod
    def of(cls, scenario: Scenario, cluster: Cluster) -> Layout:
        training, strategy = scenario.training, scenario.strategy
        num_shards = shard_group_size(strategy, cluster)
        in_loop = training.trainer is Trainer.LOOP
        mixed = training.precision.is_mixed
        casts = _casts(training)
        return cls(
            num_shards=num_shards,
            num_replicas=num_sharing_ranks(strategy, cluster) // num_shards,
            crosses_groups=strategy.split.tp > 1,
            rank=lora_rank(scenario),
            trainable_itemsize=FP32_BYTES if casts else 0,
            # accelerate upcasts what is trained; frozen weights stay as loaded, in 16 bits
            frozen_itemsize=(FP32_BYTES if in_loop else HALF_BYTES) if mixed else 0,
            gathered_itemsize=HALF_BYTES if casts else 0,
            # transformers' own FSDP, which tensor parallelism goes with, reduces in fp32
            reduced_itemsize=FP32_BYTES if casts and strategy.split.tp > 1 and not in_loop else 0,
            reshards=strategy.fsdp.sharding.reshard_after_forward,
            has_root_unit=in_loop,
            calls_head=training.loss is Loss.PLAIN and training.trainer is not Trainer.TRL,
            accumulates=accumulates(scenario),
            # that FSDP defers only the all-reduce where there are replicas
            defers_reduction=accumulates(scenario)
            and not in_loop
            and not (strategy.split.tp > 1 and is_hybrid(strategy)),
            offloads=strategy.offloads_params,
            copies_on_wire=cluster.gpu.device_kind is DeviceKind.CPU,
        )

    @property
    def adds_in_place(self) -> bool:
        """Whether each gradient is added to those of earlier micro-batches as it arrives; in another dtype than the
        reduction's all of a unit's wait for its end."""
        return self.defers_reduction and not self.reduced_itemsize

    @property
    def group(self) -> Group:
        return Group.SHARD if self.num_replicas > 1 or self.crosses_groups else Group.WORLD


class ShardedProgram(FramedProgram):
    """What both versions of FSDP add to a step alike."""

    def __init__(self, program: StepProgram, layout: Layout) -> None:
        super().__init__(program)
        self.layout = layout

    def pass_through_wire(self, place: Place, num_bytes: int, events: list[Event]) -> None:
        """The copy that gloo makes for the time of a call."""
        if self.layout.copies_on_wire:
            events.append(self.free(self.alloc(place, WIRE_SLOT, num_bytes, events), place))

    def clock_messages(self, frame: Frame, *, payload_bytes: int, reduced_bytes: int) -> None:
        """The messages of a reduction: over the shards, then of the reduced shard over the replicas."""
        if self.layout.num_shards > 1:
            payload = Size.constant(payload_bytes)
            frame.collectives.append(
                Collective(CollectiveKind.REDUCE_SCATTER, payload, Moment.AFTER, self.layout.group)
            )
        if self.layout.num_replicas > 1:
            reduced = Size.constant(reduced_bytes)
            frame.collectives.append(Collective(CollectiveKind.ALL_REDUCE, reduced, Moment.AFTER, Group.REPLICATE))


class _Sharded(NamedTuple):
    """One parameter of a unit. ``shape`` is the first rank's shard; gradients are computed in the gathered dtype."""

    shape: tuple[int, ...]
    trainable: bool
    stored_itemsize: int
    gathered_itemsize: int
    reduced_itemsize: int
    whole_bytes: int  # gathered, with padding
    gradient_bytes: int  # unsharded, without padding, where micro-batches add it up
    narrowed_bytes: int  # of the copy that is made of this rank's part where the gradient is wider than the parameter
    in_block: bool

    @property
    def numel(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def stored_bytes(self) -> int:
        return self.numel * self.stored_itemsize

    @property
    def sent_bytes(self) -> int:
        return self.numel * self.gathered_itemsize

    @property
    def reduced_bytes(self) -> int:
        return self.numel * self.reduced_itemsize

    @property
    def is_float8(self) -> bool:
        """Whether it is gathered in the 8 bits that its rank has cast it to, by torchao's ``fsdp_pre_all_gather``."""
        return self.gathered_itemsize == FLOAT8_BYTES and self.stored_itemsize == FP32_BYTES


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """What is gathered and reduced together. ``indices`` are those of its parameters in their group."""

    group: str
    indices: tuple[int, ...]
    parameters: tuple[_Sharded, ...]
    reshards: bool

    @cached_property
    def copy_sizes(self) -> tuple[Size, ...]:
        """The storages that the parameters are copied out to."""
        return tuple(Size.constant(p.whole_bytes) for p in self.parameters)

    @cached_property
    def stored_bytes(self) -> int:
        """The shards as they lie between steps."""
        return sum(p.stored_bytes for p in self.parameters)

    @cached_property
    def cast_bytes(self) -> int:
        """The shards in the dtype that they are gathered in."""
        return sum(p.sent_bytes for p in self.parameters)

    @cached_property
    def gathered_bytes(self) -> int:
        return sum(p.whole_bytes for p in self.parameters)

    @cached_property
    def recast_bytes(self) -> int:
        """The part of ``cast_bytes`` whose dtype is another than that of the shards, cast into one flat tensor."""
        cast = (p for p in self.parameters if p.stored_itemsize != p.gathered_itemsize)
        return sum(p.sent_bytes for p in cast if not p.is_float8)

    @cached_property
    def float8(self) -> tuple[_Sharded, ...]:
        """What is cast to 8 bits, each into a tensor of its own, before the rest is cast."""
        return tuple(p for p in self.parameters if p.is_float8)

    def sent_bytes(self, *, offloads: bool) -> int:
        """Bytes of the flat input that shards are cast (or fetched) into before they are gathered."""
        return self.cast_bytes if offloads else self.recast_bytes

    @cached_property
    def trainable(self) -> tuple[_Sharded, ...]:
        return tuple(p for p in self.parameters if p.trainable)

    @cached_property
    def reduced_bytes(self) -> int:
        """The reduced shard in the dtype it is reduced in: the gathered one, as accelerate sets it, or fp32."""
        return sum(p.reduced_bytes for p in self.trainable)

    @cached_property
    def gradient_bytes(self) -> int:
        """The reduced shard in the dtype of the shards."""
        return sum(p.stored_bytes for p in self.trainable)


def _sharded(parameter: Parameter, layout: Layout, *, in_block: bool) -> _Sharded:
    """The first rank's shard of ``parameter``: ``ceil(rows / shards)`` rows. 4-bit weights shard as packed bytes."""
    if parameter.packed_bytes:
        packed = divide_up(parameter.packed_bytes, layout.num_shards)
        return _Sharded((packed,), parameter.trainable, 1, 1, 1, packed * layout.num_shards, 0, 0, in_block)
    dims = parameter.sizes(layout.rank) or (1,)
    shape = (divide_up(dims[0], layout.num_shards), *dims[1:])
    stored = layout.trainable_itemsize if parameter.trainable else layout.frozen_itemsize
    is_float8 = parameter.itemsize == FLOAT8_BYTES
    gathered = FLOAT8_BYTES if is_float8 else layout.gathered_itemsize or parameter.itemsize
    reduced = layout.reduced_itemsize or (layout.gathered_itemsize if is_float8 else gathered)
    numel = parameter.numel(layout.rank)
    shard = _Sharded(shape, parameter.trainable, stored or parameter.itemsize, gathered, reduced, 0, 0, 0, in_block)
    return shard._replace(
        whole_bytes=shard.sent_bytes * layout.num_shards,
        gradient_bytes=(parameter.gradient_numel or numel) * reduced if parameter.trainable else 0,
        narrowed_bytes=numel * (reduced if layout.defers_reduction else gathered) if parameter.gradient_numel else 0,
    )


def _unit(program: StepProgram, layout: Layout, *, group: str, indices: Sequence[int], reshards: bool) -> _Unit:
    rows = program.groups[group].parameters
    in_block = group != ROOT_GROUP
    parameters = tuple(_sharded(rows[index], layout, in_block=in_block) for index in indices)
    return _Unit(group=group, indices=tuple(indices), parameters=parameters, reshards=reshards)


@dataclass(frozen=True, kw_only=True)
class _Units:
    """The units of a model: one per group of blocks; outside blocks either one for all, or one for what the first
    stage reads (the embedding) and one for what the last does (norm and head)."""

    blocks: dict[str, _Unit]
    embedding: _Unit | None = None
    root: _Unit | None = None  # lives from the first stage to the last
    tail: _Unit | None = None
    second_copy_bytes: int = 0  # of a tied weight that another unit gathers once more, for the head


def _units(program: StepProgram, layout: Layout) -> _Units:
    """Source: accelerate 1.15 ``fsdp2_prepare_model``, which carves up the root unless embedding and head are tied.
    transformers' own FSDP, which goes with tensor parallelism, carves it up alike; a tied head is tied after it has
    become the root's, so that the root gathers it as well (seen in the timeline)."""
    blocks = {
        name: _unit(program, layout, group=name, indices=range(len(group.parameters)), reshards=layout.reshards)
        for name, group in program.groups.items()
        if name != ROOT_GROUP
    }
    everything = range(len(program.groups[ROOT_GROUP].parameters))
    forward = [stage for stage in program.stages if stage.phase in (Phase.FORWARD, Phase.LOSS)]
    first = {i for layer in forward[0].order() for i in program.section_of(forward[0], layer).uses}
    last = {i for layer in forward[-1].order() for i in program.section_of(forward[-1], layer).uses}
    single = not forward[0].stack and not forward[-1].stack and len(forward) > 1
    if layout.has_root_unit or first & last or not single:
        # accelerate wraps the final norm, then the tied embedding
        order = everything if layout.has_root_unit else sorted(everything, key=lambda index: index in first)
        root = _unit(program, layout, group=ROOT_GROUP, indices=order, reshards=False)
        tied = [p for index, p in zip(root.indices, root.parameters, strict=True) if index in first & last]
        twice = layout.crosses_groups and not layout.has_root_unit
        return _Units(blocks=blocks, root=root, second_copy_bytes=sum(p.whole_bytes for p in tied) if twice else 0)
    early = [i for i in everything if i in first]
    late = [i for i in everything if i not in first]
    return _Units(
        blocks=blocks,
        embedding=_unit(program, layout, group=ROOT_GROUP, indices=early, reshards=layout.reshards),
        tail=_unit(program, layout, group=ROOT_GROUP, indices=late, reshards=False),
    )


def _counted(program: StepProgram, units: _Units) -> Iterator[tuple[_Unit, int]]:
    """Every unit with the number of times it occurs, in the model's order."""
    for single in (units.embedding, units.root):
        if single is not None:
            yield single, 1
    for name, unit in units.blocks.items():
        yield unit, program.group_counts[name]
    if units.tail is not None:
        yield units.tail, 1


class _Slot(IntEnum):
    """Slots that the rewrite uses in any section, counted from the first one that the trace leaves free."""

    FLAT_INPUT = 0
    GATHERED = 1
    PREFETCH_FLAT_INPUT = 2
    PREFETCHED = 3
    WIRE = WIRE_SLOT
    REDUCE_INPUT = 5
    REDUCED = 6
    GRADIENT = 7
    NARROWED = 8
    SECOND_COPY = 9
    SCALED = 10
    CLAMPED = 11
    COPIES = 12  # the first of one per parameter; those in 8 bits that are sent come behind them


class _Gradient(NamedTuple):
    """An unsharded gradient: whose it is, and its end."""

    parameter: int
    free: Free


class _Rewriter(ShardedProgram):
    """Walks the units in the order in which the engine meets them and notes what each adds to each section."""

    def __init__(self, program: StepProgram, layout: Layout, units: _Units) -> None:
        super().__init__(
            map_sections(program, Phase.BACKWARD, gradients_die_when_ready) if layout.adds_in_place else program,
            layout,
        )
        self.units = units
        self.copies_of: dict[int, Place] = {}  # index of a visit -> where its parameters were copied out
        self.reduce_input: Live | None = None
        self.retained: list[Live] = []

    def run(self) -> StepProgram:
        visits = list(self._visits())
        if self.layout.defers_reduction:
            self._pile_up(visits)
        self._run_forward(visits)
        self._run_backward(visits)
        return self.assemble()

    def _visits(self) -> Iterator[Visit[_Unit]]:
        """Units in the order in which their forward ends."""
        if self.units.embedding:
            yield Visit.at(self.units.embedding, self.forward_begin, self.backward_end)
        for group, there, back in self.layers():
            yield Visit.at(self.units.blocks[group], there, back)
        if self.units.tail:
            yield Visit.at(self.units.tail, self.forward_end, self.backward_begin)
        if self.units.root:
            yield Visit(
                unit=self.units.root,
                forward_begin=self.forward_begin,
                forward_end=self.forward_end,
                backward_begin=self.backward_begin,
                backward_end=self.backward_end,
            )

    def _run_forward(self, visits: Sequence[Visit[_Unit]]) -> None:
        order = list(range(len(visits)))
        if self.units.root:  # it begins first and ends last
            order = [order[-1], *order[:-1]]
        previous: Live | None = None
        if num_bytes := self.units.second_copy_bytes:
            begin, events = self.forward_begin, self.frame(self.forward_begin).before
            self.retained.append(self.alloc(begin, _Slot.SECOND_COPY, num_bytes, events, Owner.GATHERED_WEIGHTS))
        for index in order:
            unit, begin, end = visits[index].unit, visits[index].forward_begin, visits[index].forward_end
            frame = self.frame(begin)
            gathered = self._gather(unit, begin, frame.before, slot=_Slot.GATHERED)
            self._copy_out(index, unit, begin, frame.before)
            if previous:
                frame.before.append(self.free(previous, begin))
            previous = gathered
            self._clock_gather(unit, frame)
            if unit.reshards:
                self._reshard(index, unit, end, self.frame(end).behind)
        if previous:
            self.frame(self.forward_end).behind.append(self.free(previous, self.forward_end))

    def _run_backward(self, visits: Sequence[Visit[_Unit]]) -> None:
        prefetched: Live | None = None
        for index in range(len(visits) - 1, -1, -1):
            visit = visits[index]
            frame = self.frame(visit.backward_begin)
            if index not in self.copies_of and self._is_reached(visit):
                if prefetched is None:
                    prefetched = self._gather(visit.unit, visit.backward_begin, frame.before, slot=_Slot.GATHERED)
                self._copy_out(index, visit.unit, visit.backward_begin, frame.before)
                if prefetched:
                    frame.before.append(self.free(prefetched, visit.backward_begin))
                prefetched = None
                self._clock_gather(visit.unit, frame)
            ahead = visits[index - 1] if index else None
            if ahead and ahead.unit.reshards:
                events = frame.after_logits if self._begins_with_head(visit.unit) else frame.before
                prefetched = self._gather(ahead.unit, visit.backward_begin, events, slot=_Slot.PREFETCHED)
            if visit.unit is not self.units.root:
                self._finish(index, visit)
        end = self.backward_end
        if self.units.root:
            self._finish(len(visits) - 1, visits[-1])
        for live in (prefetched, self.reduce_input, *self.retained):
            if live:
                self.frame(end).behind.append(self.free(live, end))

    def _begins_with_head(self, unit: _Unit) -> bool:
        """Whether the unit's backward begins with the head's, not with the loss: accelerate wraps the head's module,
        tied or not, and the loop the whole model. A head that a fused loss reads is not called."""
        outside = unit is self.units.tail or (unit is self.units.root and not self.layout.has_root_unit)
        return outside and self.layout.calls_head

    def _is_reached(self, visit: Visit[_Unit]) -> bool:
        """A frozen embedding has no backward of its own, though the prefetch gathers it."""
        return visit.unit is not self.units.embedding or bool(visit.unit.trainable)

    def _gather(self, unit: _Unit, place: Place, events: list[Event], *, slot: _Slot) -> Live | None:
        """The all-gather's buffers. One rank alone gathers nothing and copies its shard out."""
        if self.layout.num_shards == 1 or not unit.parameters:
            return None
        cast = self._cast_to_float8(unit, place, events)
        sent_bytes = unit.sent_bytes(offloads=self.layout.offloads)
        flat = self._on_gather(place, slot - 1, sent_bytes, events)
        gathered = self._on_gather(place, slot, unit.gathered_bytes, events)
        self.pass_through_wire(place, unit.gathered_bytes, events)
        events.extend(self.free(live, place) for live in (*cast, flat))
        return gathered

    def _on_gather(self, place: Place, slot: int, num_bytes: int, events: list[Event]) -> Live:
        return self.alloc(place, slot, num_bytes, events, stream=Stream.GATHER)

    def _cast_to_float8(self, unit: _Unit, place: Place, events: list[Event]) -> list[Live]:
        """The shards in 8 bits, there until they are sent. While each is made, it exists in fp32 twice more: scaled,
        and clamped.

        Source: torchao 0.18 ``WeightWithDynamicFloat8CastTensor.fsdp_pre_all_gather``, ``_ToFloat8ConstrFunc``,
        ``to_fp8_saturated``. Omits: the scales, 4 bytes each.
        """
        cast = []
        first = _Slot.COPIES + len(unit.parameters)
        for slot, parameter in enumerate(unit.float8, first):
            wide = [self._on_gather(place, s, parameter.stored_bytes, events) for s in (_Slot.SCALED, _Slot.CLAMPED)]
            cast.append(self._on_gather(place, slot, parameter.sent_bytes, events))
            events.extend(self.free(live, place) for live in wide)
        return cast

    def _copy_out(self, index: int, unit: _Unit, place: Place, events: list[Event]) -> None:
        first = self.first_slot + _Slot.COPIES
        events += [Alloc(slot, size, Owner.GATHERED_WEIGHTS) for slot, size in enumerate(unit.copy_sizes, first)]
        self.copies_of[index] = place

    def _reshard(self, index: int, unit: _Unit, place: Place, events: list[Event]) -> None:
        born = self.copies_of.pop(index, None)
        if born is None:
            return
        stage, anchor, layer, first = self.ref(Live(born, self.first_slot + _Slot.COPIES, 0), place)
        sizes = enumerate(unit.copy_sizes, first)
        events += [Free(TensorRef(stage, anchor, layer, slot), size) for slot, size in sizes]

    def _finish(self, index: int, visit: Visit[_Unit]) -> None:
        """What follows a unit's backward: reshard, the previous reduce input, this unit's reduction."""
        unit, place = visit.unit, visit.backward_end
        frame = self.frame(place)
        gradients = self._collect(visit, frame) if unit.trainable else []
        self._reshard(index, unit, place, frame.behind)
        if self.reduce_input:
            frame.behind.append(self.free(self.reduce_input, place))
            self.reduce_input = None
        if unit.trainable:
            self._reduce(visit, frame, gradients)

    def _collect(self, visit: Visit[_Unit], frame: Frame) -> list[_Gradient]:
        """The unit's unsharded gradients as its reduction takes them: this micro-batch's added to the earlier ones',
        and a copy of this rank's part in place of any that is wider than its parameter."""
        unit, place, events = visit.unit, visit.backward_end, frame.behind
        gradients = list(self._unsharded_gradients(visit))
        if self.layout.defers_reduction and not self.layout.adds_in_place:
            born = self.gradients(unit.group, place)
            events.extend(live.free for live in self._of_unit(unit, born, place))
        parameters = dict(zip(unit.indices, unit.parameters, strict=True))
        narrowed = sum(p.narrowed_bytes for p in unit.parameters)
        if not narrowed:
            return gradients
        copy = self.alloc(place, _Slot.NARROWED, narrowed, events)
        wide = [live for live in gradients if parameters[live.parameter].narrowed_bytes]
        events.extend(live.free for live in wide)
        kept = [live for live in gradients if live not in wide]
        return [*kept, _Gradient(wide[-1].parameter, self.free(copy, place))]

    def _reduce(self, visit: Visit[_Unit], frame: Frame, gradients: Sequence[_Gradient]) -> None:
        unit, place, events = visit.unit, visit.backward_end, frame.behind
        num_shards = self.layout.num_shards
        self.reduce_input = self.alloc(place, _Slot.REDUCE_INPUT, unit.reduced_bytes * num_shards, events)
        # torch's loop over gradients (``foreach_reduce``) keeps its variable, so the last one, until it returns.
        arrived = [live.parameter for live in gradients] if num_shards > 1 else []
        last = max(arrived, key=unit.indices.index, default=-1)
        events.extend(live.free for live in gradients if live.parameter != last)
        changes_dtype = unit.reduced_bytes != unit.gradient_bytes
        owner = Owner.COMMUNICATION if changes_dtype else Owner.GRADIENTS
        reduced = self.alloc(place, _Slot.REDUCED, unit.reduced_bytes, events, owner, stream=Stream.REDUCE)
        if num_shards > 1:
            self.pass_through_wire(place, unit.reduced_bytes * num_shards, events)
        gradient = reduced
        if changes_dtype:
            kept_bytes = unit.gradient_bytes
            gradient = self.alloc(place, _Slot.GRADIENT, kept_bytes, events, Owner.GRADIENTS, stream=Stream.REDUCE)
            # With replicas the buffer of the all-reduce is kept until the backward ends, lest it be reused in flight.
            if self.layout.num_replicas > 1:
                self.retained.append(reduced)
            else:
                events.append(self.free(reduced, place))
        events.extend(live.free for live in gradients if live.parameter == last)
        if self.layout.offloads or (self.layout.accumulates and not self.layout.defers_reduction):
            events.append(self.free(gradient, place))
        self._clock_reduce(unit, frame)

    def _unsharded_gradients(self, visit: Visit[_Unit]) -> Iterator[_Gradient]:
        """The unsharded gradients of the unit, wherever they arose: of this micro-batch, or of all under no_sync."""
        born: Iterable[tuple[Place, Alloc]] = self.gradients(visit.unit.group, visit.backward_end)
        if self.layout.defers_reduction:
            pile = self.pile(visit.unit.group, visit.forward_begin)
            born = [(pile, alloc) for alloc in self.accumulated[pile]]
        return self._of_unit(visit.unit, born, visit.backward_end)

    def _of_unit(self, unit: _Unit, born: Iterable[tuple[Place, Alloc]], end: Place) -> Iterator[_Gradient]:
        for place, alloc in born:
            if alloc.parameter in unit.indices:
                ref = self.ref(Live(place, alloc.slot, 0), end)
                yield _Gradient(alloc.parameter, Free(ref, alloc.size))

    def _pile_up(self, visits: Sequence[Visit[_Unit]]) -> None:
        """Whole gradients of earlier micro-batches, in the dtype of computation, there when the last one begins."""
        for visit in visits:
            allocs = self.accumulated.setdefault(self.pile(visit.unit.group, visit.forward_begin), [])
            for index, parameter in zip(visit.unit.indices, visit.unit.parameters, strict=True):
                if parameter.trainable:
                    size = Size.constant(parameter.gradient_bytes)
                    allocs.append(Alloc(self.first_slot + index, size, Owner.GRADIENTS, index))

    def _clock_gather(self, unit: _Unit, frame: Frame) -> None:
        if self.layout.offloads:
            frame.copies.append(Copy(True, Size.constant(unit.stored_bytes), Moment.BEFORE))
        if self.layout.num_shards > 1 and unit.parameters:
            payload = Size.constant(unit.gathered_bytes)
            frame.collectives.append(Collective(CollectiveKind.ALL_GATHER, payload, Moment.BEFORE, self.layout.group))
        scaled = 4 * sum(p.stored_bytes for p in unit.float8)  # written and read again, then clamped alike
        moved = unit.stored_bytes + scaled + unit.cast_bytes + 2 * unit.gathered_bytes
        frame.kernels.append(Kernel(1, Size.constant(0), Size.constant(moved), False))

    def _clock_reduce(self, unit: _Unit, frame: Frame) -> None:
        payload = unit.reduced_bytes * self.layout.num_shards
        self.clock_messages(frame, payload_bytes=payload, reduced_bytes=unit.reduced_bytes)
        if self.layout.offloads:
            frame.copies.append(Copy(False, Size.constant(unit.gradient_bytes), Moment.AFTER))
        frame.kernels.append(Kernel(1, Size.constant(0), Size.constant(2 * payload), False))


def _with_state(
    program: StepProgram,
    parameters: Iterable[_Sharded],
    units: _Units,
    layout: Layout,
    *,
    scenario: Scenario,
    cluster: Cluster,
) -> StepProgram:
    """``program`` with the shards, the optimizer on them and what earlier micro-batches left."""
    shards = list(parameters)
    trained = tuple(LocalTensor(p.shape, p.stored_itemsize, p.in_block) for p in shards if p.trainable)
    persistent = [*program.persistent, *unsharded_scales(program)]
    on_host = 0
    if layout.offloads:
        on_host = sum(p.stored_bytes for p in shards) + host_optimizer_bytes(trained, scenario=scenario)
    else:
        persistent += persistent_run((p.stored_bytes for p in shards), Owner.WEIGHTS)
        if layout.accumulates and not layout.defers_reduction:
            sizes = (unit.gradient_bytes for unit, count in _counted(program, units) for _ in range(count))
            persistent += persistent_run(sizes, Owner.GRADIENTS)
    program = replace(
        program,
        persistent=tuple(persistent),
        host_persistent_bytes=program.host_persistent_bytes + on_host,
        arrivals=tuple(_arrivals(shards, scenario)),
    )
    step = OptimizerStep(tensors=trained, on_host=layout.offloads)
    return with_optimizer(program, step, scenario=scenario, device=cluster.gpu.device_kind)


def _arrivals(shards: Sequence[_Sharded], scenario: Scenario) -> Iterator[Arrival]:
    """Each weight comes whole and leaves its shard: sent by the first rank, where the others hold one until they have
    room for the next; else moved. 4-bit weights have been made on the device, all of them.

    Source: accelerate 1.15 ``fsdp2_load_full_state_dict``, confirmed on a timeline of two gloo processes. Omits: where
    nothing is sent, weights are moved a unit at a time.
    """
    waits, lingers = scenario.training.method is Method.QLORA, scenario.loads_on_first_rank
    distinct = {id(shard): shard for shard in shards}
    made = {
        key: Arrival(
            kept=shard.stored_bytes,
            pieces=(shard.whole_bytes // shard.gathered_itemsize * shard.stored_itemsize,),
            waits=waits,
            lingers=lingers,
        )
        for key, shard in distinct.items()
    }
    return (made[id(shard)] for shard in shards)


def unsharded_scales(program: StepProgram) -> Iterator[Persistent]:
    """Scales of 4-bit weights are no parameters: every rank keeps them all."""
    for name, group in program.groups.items():
        for parameter in group.parameters:
            if parameter.extra_bytes:
                size = Size.constant(parameter.extra_bytes)
                yield Persistent(size, Owner.WEIGHTS, program.group_counts[name])


def host_optimizer_bytes(trained: Sequence[LocalTensor], *, scenario: Scenario) -> int:
    """Gradients and optimizer states of one rank in host memory."""
    optimizer = find(scenario.training.optimizer)
    states = optimizer.total_state_bytes(trained, device=DeviceKind.CPU)
    return states + sum(tensor.num_bytes for tensor in trained)
