"""FSDP1 (``FullyShardedDataParallel``): every unit's parameters flattened into one, gathered and reduced whole.

A *unit* is a block, or what no block holds; under ``NO_WRAP`` the whole model is one. Source: torch 2.13
``torch/distributed/fsdp`` (``_flat_param.py``,
``_runtime_utils.py``), confirmed on timelines of two and four gloo processes. One life of a unit:

- between steps a rank holds its shard of the flat parameter: with ``use_orig_params`` each parameter begins at 16 bytes
  and the whole is padded to the number of shards, without it only the shards are made equal.
- gather: the shard is cast into ``_mp_shard`` where the compute dtype differs, gathered into one flat tensor of which
  parameters are views (nothing is copied out), and ``_mp_shard`` dies.
- after its forward the flat tensor dies, except the root's, and all of them where weights are kept for the backward.
- before its backward the unit is gathered again, if the prefetch has not done so: each unit's backward begins by
  gathering the next one's, so two are there at a time. ``BACKWARD_POST`` gathers the next one when this one's weights
  are gone, beside its flat gradient; the root's backward ends last and fetches none. After ``forward_prefetch`` a
  unit's backward ends only when the next one's computation is over.
- after its backward the gradients of its parameters, all of which live until then, are concatenated into a flat one
  and die; the weights die; the flat gradient is reduced into a shard, which is cast into the dtype of the shards; the
  flat gradient dies.

Frozen weights that are flattened with adapters get gradients like them. transformers' Trainer has PEFT wrap each
adapter as a unit of its own, so that none arise; a frozen unit whose input needs no gradient keeps its weights to the
end of the backward pass. ``NO_SHARD``, which torch also takes for a single shard, holds everything whole, and only
casts.

On CUDA gathers and reductions make their buffers on streams of their own (``_unshard``, ``_reduce_grad``) and mark what
another stream still reads (``record_stream``), so that its block is not handed out again at once. The rate limiter lets
the processor run ahead by two gathers (``_FreeEventQueue``), by when the computation on gathered weights is over; the
reduction begins after it, so that the flat gradient takes one gather more.

Omits: with ``use_orig_params`` the reduced gradients outlive ``zero_grad`` until the next forward pass begins, where no
peak sees them. Without ``limit_all_gathers`` a GPU's processor runs ahead without bounds, which is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.optimizers import FP32_BYTES, LocalTensor
from launchkit.program import (
    Alloc,
    Arrival,
    Collective,
    CollectiveKind,
    Copy,
    Event,
    Free,
    Kernel,
    Moment,
    Owner,
    Parameter,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    Stream,
    local,
)
from launchkit.scenario import (
    BackwardPrefetch,
    DeviceKind,
    Method,
    Scenario,
    Sharding,
    State,
    Strategy,
    TraceKey,
    Trainer,
    Training,
    Wrap,
)
from launchkit.strategies import fsdp2
from launchkit.strategies.base import (
    HALF_BYTES,
    ROOT_GROUP,
    OptimizerStep,
    is_gradient,
    map_sections,
    next_slot,
    persistent_run,
    with_an_end,
    with_optimizer,
    with_ready_gradients,
)
from launchkit.strategies.ddp import broadcast_buckets
from launchkit.strategies.frames import Frame, Live, Place, Visit
from launchkit.strategies.fsdp2 import WIRE_SLOT, Layout, ShardedProgram
from launchkit.strategies.weights import loaded_itemsize
from launchkit.units import divide_up

ALIGNMENT_BYTES = 16  # of each parameter within the flat one. Source: ``_get_aligned_numel``
GATHERS_AHEAD = 2  # of the one whose weights are computed with. Source: ``_limiter_utils.py``


def trace_key(training: Training, strategy: Strategy, device: DeviceKind, *, single_sequence: bool = False) -> TraceKey:
    """FSDP2's, but for autocast, which accelerate wraps the forward pass in, and adapters. Flattened with frozen
    weights, these make them views of a tensor that requires a gradient, so that they get one. As units of their own
    they still lie there in fp32 when PEFT asks for their dtype, so that it widens their input, and autocast narrows it
    again: one copy per adapter. Those on 4-bit weights leave the input to autocast (peft 0.21 ``tuners/lora/bnb.py``).
    """
    compute = fsdp2.compute_of_gathered(training)
    key = fsdp2.key_of_gathered(training, strategy, device, compute=compute, single_sequence=single_sequence)
    flattens = _flattens_adapters(training)
    casts = key.cast_adapters and (flattens or training.method is Method.QLORA)
    return replace(key, flat_gradients=flattens or bool(key.freeze), cast_adapters=casts)


def _flattens_adapters(training: Training) -> bool:
    """Whether adapters lie in the flat parameters of their blocks: transformers' Trainer has them wrapped apart."""
    return training.method is not Method.FULL and training.trainer is Trainer.LOOP


def refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What FSDP2 refuses, except unsharded weights, and adapters beside frozen weights in one flat parameter."""
    fsdp = scenario.strategy.fsdp
    if _flattens_adapters(scenario.training) and not fsdp.use_orig_params:
        return (
            "use_orig_params: false flattens no adapters together with frozen weights; set it to true, or use "
            "--strategy fsdp2"
        )
    if not fsdp.limit_all_gathers and cluster.gpu.device_kind is DeviceKind.CUDA:
        return (
            "limit_all_gathers=false lets the processor run ahead of a GPU by as many gathered units as it can, which "
            "is not modelled; leave it out"
        )
    if fsdp.wrap is Wrap.MODEL and scenario.training.method is not Method.FULL:
        return (
            "auto_wrap_policy=NO_WRAP is modelled for full fine-tunes, as PEFT has its adapters wrapped; leave it out, "
            "or use --method full"
        )
    if fsdp.sharding is Sharding.NO_SHARD:
        whole = replace(fsdp, sharding=Sharding.SHARD_GRAD_OP)
        scenario = replace(scenario, strategy=replace(scenario.strategy, fsdp=whole))
    return fsdp2.refusal(scenario, profile, cluster)


def rewrite(program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> StepProgram:
    """What the rank with the most to train does in a step; all ranks hold equally much of the weights."""
    program, layout = with_an_end(program), _layout(scenario, cluster)
    units = _units(program, layout, scenario)
    rewritten = _Rewriter(program, layout, units, scenario).run()
    return _with_state(rewritten, units, layout, scenario=scenario, cluster=cluster)


def _layout(scenario: Scenario, cluster: Cluster) -> Layout:
    """FSDP2's layout, in which nothing is sharded under ``NO_SHARD``: all ranks are replicas of each other."""
    layout = Layout.of(scenario, cluster)
    if scenario.strategy.fsdp.sharding is not Sharding.NO_SHARD:
        return layout
    return replace(layout, num_shards=1, num_replicas=cluster.num_gpus, reshards=False)


@dataclass(frozen=True, kw_only=True)
class _Flat:
    """One flat parameter. ``numel`` counts its parameters and the padding that aligns them; ``trained`` says where the
    trainable ones lie in it."""

    numel: int
    num_shards: int
    stored_itemsize: int
    gathered_itemsize: int
    trained: tuple[tuple[int, int], ...] = ()
    loaded_itemsize: int
    loaded: tuple[int, ...]  # bytes of each parameter as it arrives
    num_zeros: int = 0  # elements of 4-bit weights, which get no gradient
    in_block: bool = True

    @property
    def is_trainable(self) -> bool:
        return bool(self.trained)

    @property
    def is_cast(self) -> bool:
        return self.stored_itemsize != self.gathered_itemsize

    @cached_property
    def shard_numel(self) -> int:
        return divide_up(self.numel, self.num_shards)

    @cached_property
    def stored_bytes(self) -> int:
        """The shard between steps, and its gradient."""
        return self.shard_numel * self.stored_itemsize

    @cached_property
    def cast_bytes(self) -> int:
        """The shard in the dtype of computation, in which it is gathered and its gradient reduced."""
        return self.shard_numel * self.gathered_itemsize

    @cached_property
    def gathered_bytes(self) -> int:
        """All shards, which the padding makes equal."""
        return self.cast_bytes * self.num_shards

    @cached_property
    def gradient_bytes(self) -> int:
        """The flat gradient before it is padded."""
        return self.numel * self.gathered_itemsize

    @cached_property
    def zeros_bytes(self) -> int:
        return self.num_zeros * self.gathered_itemsize if self.is_trainable else 0

    def arrival(self, *, is_sent: bool, waits: bool) -> Arrival:
        """The parameters, sent by the first rank where ``is_sent``, and copied into a flat one whose shard is cloned.

        Source: torch 2.13 ``_init_utils.py``, where the caller holds the parameters until the shard is there.
        Confirmed on a timeline of two gloo processes.
        """
        shard = self.shard_numel * self.loaded_itemsize
        return Arrival(
            kept=self.stored_bytes,
            pieces=self.loaded,
            passing=tuple(broadcast_buckets(self.loaded)) if is_sent else (),
            joined=self.numel * self.loaded_itemsize,
            narrow=shard if shard != self.stored_bytes else 0,
            waits=waits,
        )

    def trained_on(self, rank: int) -> Iterator[LocalTensor]:
        """What the optimizer of one rank sees: its part of each original parameter."""
        begin, end = rank * self.shard_numel, (rank + 1) * self.shard_numel
        for first, last in self.trained:
            numel = min(last, end) - max(first, begin)
            if numel > 0:
                yield LocalTensor((numel,), self.stored_itemsize, self.in_block)


def _flat(
    parameters: Iterable[Parameter], layout: Layout, *, in_block: bool, aligns: bool, loaded_itemsize: int
) -> _Flat:
    """``parameters`` flattened in order. With ``aligns`` each is a tensor of its own to the optimizer, else all one.
    They are loaded in ``loaded_itemsize`` bytes per element, or in as many as they are stored in if those are fewer.

    4-bit weights lie in storage of the other weights' dtype (``bnb_4bit_quant_storage``): torch flattens only one.
    """
    rows = list(parameters)
    is_trainable = any(row.trainable for row in rows)
    itemsize = next((row.itemsize for row in rows if not row.packed_bytes), HALF_BYTES)
    gathered = layout.gathered_itemsize or itemsize
    stored = (layout.trainable_itemsize if is_trainable else layout.frozen_itemsize) or itemsize
    step = ALIGNMENT_BYTES // gathered if aligns else 1
    loaded = min(stored, loaded_itemsize)
    numel = num_zeros = 0
    trained = []
    sizes = []
    for row in rows:
        numel = divide_up(numel, step) * step
        size = row.packed_bytes // gathered if row.packed_bytes else row.numel(layout.rank)
        if row.trainable:
            trained.append((numel, numel + size))
        num_zeros += size if row.packed_bytes else 0
        numel += size
        sizes.append(size * loaded)
    if aligns:
        numel = divide_up(numel, layout.num_shards) * layout.num_shards
    elif is_trainable:
        trained = [(0, numel)]
    return _Flat(
        numel=numel,
        num_shards=layout.num_shards,
        stored_itemsize=stored,
        gathered_itemsize=gathered,
        trained=tuple(trained),
        num_zeros=num_zeros,
        in_block=in_block,
        loaded_itemsize=loaded,
        loaded=tuple(sizes),
    )


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """What is gathered together: a flat parameter, and beside it the adapters that are units of their own.

    ``reshards`` says whether the weights die between forward and backward. The adapters' weights come and go one after
    the other, with one prefetched: the two largest stand for them.
    """

    group: str
    flat: _Flat | None
    adapters: tuple[_Flat, ...] = ()
    reshards: bool = True

    @cached_property
    def flats(self) -> tuple[_Flat, ...]:
        return (*((self.flat,) if self.flat else ()), *self.adapters)

    @cached_property
    def adapter_bytes(self) -> int:
        return sum(sorted((flat.gathered_bytes for flat in self.adapters), reverse=True)[:2])

    @property
    def reduces(self) -> bool:
        return self.flat is not None and self.flat.is_trainable


def _units(program: StepProgram, layout: Layout, scenario: Scenario) -> dict[str, _Unit]:
    """One unit per group of parameters; the one outside blocks is the root, and with ``NO_WRAP`` the only one."""
    wraps_adapters = scenario.training.method is not Method.FULL and not _flattens_adapters(scenario.training)
    aligns = scenario.strategy.fsdp.use_orig_params
    loaded = loaded_itemsize(scenario) if scenario.training.method is Method.FULL else FP32_BYTES
    units: dict[str, _Unit] = {}
    if scenario.strategy.fsdp.wrap is Wrap.MODEL:
        every = [p for name, group in program.groups.items() for p in group.parameters * program.group_counts[name]]
        flat = _flat(every, layout, in_block=False, aligns=aligns, loaded_itemsize=loaded)
        return {ROOT_GROUP: _Unit(group=ROOT_GROUP, flat=flat, reshards=layout.num_shards == 1)}
    for name, group in program.groups.items():
        own = [p for p in group.parameters if wraps_adapters and p.trainable]
        rest = [p for p in group.parameters if not (wraps_adapters and p.trainable)]
        in_block = name != ROOT_GROUP
        units[name] = _Unit(
            group=name,
            flat=_flat(rest, layout, in_block=in_block, aligns=aligns, loaded_itemsize=loaded) if rest else None,
            adapters=tuple(_flat([p], layout, in_block=in_block, aligns=aligns, loaded_itemsize=loaded) for p in own),
            reshards=layout.num_shards == 1 or (layout.reshards and in_block),
        )
    return units


class _Slot(IntEnum):
    """Slots that the rewrite uses in any section, counted from the first one that the trace leaves free."""

    CAST = 0
    GATHERED = 1
    PREFETCH_CAST = 2
    PREFETCHED = 3
    WIRE = WIRE_SLOT
    ADAPTERS = 5
    ZEROS = 6
    FLAT_GRADIENT = 7
    PADDED = 8
    REDUCED = 9
    GRADIENT = 10
    WIDE = 11


class _Rewriter(ShardedProgram):
    """Walks the units in the order in which the engine meets them and notes what each adds to each section."""

    def __init__(self, program: StepProgram, layout: Layout, units: dict[str, _Unit], scenario: Scenario) -> None:
        if any(unit.adapters for unit in units.values()):
            program = map_sections(
                _without_cast_adapters(program), Phase.BACKWARD, _Adapters(program, layout, units).of
            )
        super().__init__(program, layout)
        self.units = units
        self.is_one_unit = scenario.strategy.fsdp.wrap is Wrap.MODEL
        self.prefetch = scenario.strategy.fsdp.backward_prefetch
        # The order of units is known once a forward pass has recorded it.
        self.prefetches_forward = scenario.strategy.fsdp.forward_prefetch and scenario.state is not State.FIRST
        self.gathered: dict[int, Live] = {}  # index of a visit -> its flat weights
        self.kept: list[Live] = []  # until the backward ends

    def run(self) -> StepProgram:
        visits = list(self._visits())
        if self.layout.defers_reduction:
            self._pile_up(visits)
        self._run_forward(visits)
        self._run_backward(visits)
        return self.assemble()

    def _visits(self) -> Iterator[Visit[_Unit]]:
        """Units in the order in which their forward ends: the root's begins first and ends last."""
        for group, there, back in self.layers() if not self.is_one_unit else ():
            yield Visit.at(self.units[group], there, back)
        yield Visit(
            unit=self.units[ROOT_GROUP],
            forward_begin=self.forward_begin,
            forward_end=self.forward_end,
            backward_begin=self.backward_begin,
            backward_end=self.backward_end,
        )

    def _run_forward(self, visits: Sequence[Visit[_Unit]]) -> None:
        root = len(visits) - 1
        order = [root, *range(root)]
        for index, following in zip(order, [*order[1:], None], strict=True):
            visit = visits[index]
            place, frame = visit.forward_begin, self.frame(visit.forward_begin)
            self._ensure(index, visit.unit, place, frame.before, slot=_Slot.GATHERED)
            if self.prefetches_forward and following is not None:
                self._ensure(following, visits[following].unit, place, frame.before, slot=_Slot.PREFETCHED)
            self._clock_gather(visit.unit, frame)
            self._hold_adapters(visit.unit, place, visit.forward_end)
            if visit.unit.reshards:
                self._reshard(index, visit.forward_end)

    def _run_backward(self, visits: Sequence[Visit[_Unit]]) -> None:
        """Autograd runs what was recorded last first. A unit that the forward pass prefetched was split into its
        parameters before the unit ahead of it computed: its backward is over when that one's is."""
        root = len(visits) - 1
        late: int | None = None
        for index in range(root, -1, -1):
            visit = visits[index]
            place, frame = visit.backward_begin, self.frame(visit.backward_begin)
            if visit.unit.reshards:
                self._clock_gather(visit.unit, frame)
            self._ensure(index, visit.unit, place, frame.before, slot=_Slot.GATHERED)
            if self.prefetch is BackwardPrefetch.PRE and index:
                self._ensure(index - 1, visits[index - 1].unit, place, frame.before, slot=_Slot.PREFETCHED)
            self._hold_adapters(visit.unit, place, visit.backward_end)
            if late is not None:
                self._finish(late, visits[late], visit.backward_end, shift=len(_Slot))
                late = None
            if index == root:
                continue
            if self.prefetches_forward and visit.unit.reduces:
                late = index
                continue
            # Without a gradient of its input nothing tells a frozen unit that its backward is over.
            ends = visit.unit.reduces or index > 0 or self.units[ROOT_GROUP].reduces
            following = visits[index - 1].unit if self.prefetch is BackwardPrefetch.POST and index else None
            self._finish(index, visit, visit.backward_end, ends=ends, following=following)
        if late is not None:
            self._finish(late, visits[late], visits[root].backward_end, shift=len(_Slot))
        self._finish(root, visits[root], visits[root].backward_end, ends=self.units[ROOT_GROUP].reduces)
        end = self.backward_end
        self.frame(end).behind.extend(self.free(live, end) for live in (*self.gathered.values(), *self.kept))

    def _ensure(self, index: int, unit: _Unit, place: Place, events: list[Event], *, slot: int) -> None:
        """Gathers the unit unless it is there."""
        flat = unit.flat
        if index in self.gathered or flat is None:
            return
        if self.layout.num_shards == 1:
            if flat.is_cast:
                self.gathered[index] = self.alloc(place, slot, flat.gathered_bytes, events, Owner.GATHERED_WEIGHTS)
            return
        sent = self._send(flat, place, events, slot=slot - 1)
        self.gathered[index] = self._gather(place, slot, flat.gathered_bytes, events, lag=GATHERS_AHEAD)
        self.pass_through_wire(place, flat.gathered_bytes, events)
        if sent:
            events.append(self.free(sent, place))

    def _gather(self, place: Place, slot: int, num_bytes: int, events: list[Event], *, lag: int) -> Live:
        return self.alloc(place, slot, num_bytes, events, Owner.GATHERED_WEIGHTS, stream=Stream.GATHER, lag=lag)

    def _send(self, flat: _Flat, place: Place, events: list[Event], *, slot: int) -> Live | None:
        """The shard as it is gathered, where that is not the one that lies there: cast, or fetched from the host."""
        if not flat.is_cast:
            return self._shard(place, slot, flat.stored_bytes, events) if self.layout.offloads else None
        cast = self._shard(place, slot, flat.cast_bytes, events)
        if self.layout.offloads:
            wide = self.alloc(place, _Slot.WIDE, flat.stored_bytes, events, stream=Stream.SHARD)
            events.append(self.free(wide, place))
        return cast

    def _shard(self, place: Place, slot: int, num_bytes: int, events: list[Event]) -> Live:
        return self.alloc(place, slot, num_bytes, events, stream=Stream.SHARD, lag=GATHERS_AHEAD)

    def _reshard(self, index: int, place: Place) -> None:
        live = self.gathered.pop(index, None)
        if live:
            self.frame(place).behind.append(self.free(live, place))

    def _hold_adapters(self, unit: _Unit, begin: Place, end: Place) -> None:
        if unit.adapter_bytes and self.layout.num_shards > 1:
            events = self.frame(begin).before
            live = self._gather(begin, _Slot.ADAPTERS, unit.adapter_bytes, events, lag=0)
            self.frame(end).behind.append(self.free(live, end))

    def _finish(
        self,
        index: int,
        visit: Visit[_Unit],
        place: Place,
        *,
        ends: bool = True,
        following: _Unit | None = None,
        shift: int = 0,
    ) -> None:
        """What follows a unit's backward, which is over at ``place``: the flat gradient, the end of the weights, the
        weights of the ``following`` unit if they are fetched then, the reduction. ``shift`` keeps its slots apart from
        those of a unit that ends there too."""
        frame, flat = self.frame(place), visit.unit.flat
        if flat is None or not flat.is_trainable:
            if ends:
                self._reshard(index, place)
            if ends and following:
                self._ensure(index - 1, following, place, frame.behind, slot=_Slot.PREFETCHED)
            return
        gradient = self._flatten_gradient(visit, flat, place, frame.behind, shift=shift)
        self._reshard(index, place)
        if following:
            self._ensure(index - 1, following, place, frame.behind, slot=_Slot.PREFETCHED)
        if self.layout.num_shards == 1:
            self._average(flat, gradient, place, frame.behind, shift=shift)
        else:
            self._reduce(flat, gradient, place, frame.behind, shift=shift)
        self._clock_reduce(flat, frame)

    def _flatten_gradient(
        self, visit: Visit[_Unit], flat: _Flat, place: Place, events: list[Event], *, shift: int
    ) -> Live:
        """The backward of the split into views: every gradient until now, and zeros for what has none, concatenated."""
        zeros = (
            self.alloc(place, _Slot.ZEROS + shift, flat.zeros_bytes, events, Owner.TEMPORARIES)
            if flat.zeros_bytes
            else None
        )
        owner = Owner.COMMUNICATION if self.layout.num_shards > 1 or flat.is_cast else Owner.GRADIENTS
        lag = GATHERS_AHEAD + 1 if self.layout.num_shards > 1 else 0
        gradient = self.alloc(place, _Slot.FLAT_GRADIENT + shift, flat.gradient_bytes, events, owner, lag=lag)
        events.extend(self._gradient_frees(visit, place))
        if zeros:
            events.append(self.free(zeros, place))
        piled = self.accumulated.get(self.pile(visit.unit.group, visit.forward_begin), ())
        for alloc in piled:  # of the micro-batches before, to which this one's is added
            events.append(self.free(gradient, place))
            gradient = Live(self.pile(visit.unit.group, visit.forward_begin), alloc.slot, flat.gradient_bytes)
        return gradient

    def _gradient_frees(self, visit: Visit[_Unit], place: Place) -> Iterator[Event]:
        """The gradients of the unit's parameters, wherever they arose."""
        found = [*self.gradients(visit.unit.group, visit.backward_end)]
        if self.is_one_unit:
            found += [pair for group, _, back in self.layers() for pair in self.gradients(group, back)]
        for born, event in found:
            yield Free(self.ref(Live(born, event.slot, 0), place), event.size)

    def _reduce(self, flat: _Flat, gradient: Live, place: Place, events: list[Event], *, shift: int) -> None:
        """Reduce-scatter of the flat gradient, padded if need be, and the cast of what this rank gets."""
        padded = None
        if flat.gathered_bytes != flat.gradient_bytes:
            padded = self.alloc(place, _Slot.PADDED + shift, flat.gathered_bytes, events, stream=Stream.REDUCE)
        owner = Owner.COMMUNICATION if flat.is_cast else Owner.GRADIENTS
        reduced = self.alloc(place, _Slot.REDUCED + shift, flat.cast_bytes, events, owner, stream=Stream.REDUCE)
        self.pass_through_wire(place, flat.gathered_bytes, events)
        kept = reduced
        if flat.is_cast:
            stored = flat.stored_bytes
            kept = self.alloc(place, _Slot.GRADIENT + shift, stored, events, Owner.GRADIENTS, stream=Stream.REDUCE)
            events.append(self.free(reduced, place))
        events.extend(self.free(live, place) for live in (padded, gradient) if live)
        if self.layout.offloads:
            self.kept.append(kept)
        elif self.layout.accumulates and not self.layout.defers_reduction:
            events.append(self.free(kept, place))

    def _average(self, flat: _Flat, gradient: Live, place: Place, events: list[Event], *, shift: int) -> None:
        """All-reduce in place of an unsharded gradient, which becomes the parameter's."""
        if flat.is_cast:
            kept = self.alloc(place, _Slot.GRADIENT + shift, flat.stored_bytes, events, Owner.GRADIENTS)
            events.append(self.free(gradient, place))
            gradient = kept
        if self.layout.accumulates and not self.layout.defers_reduction:
            events.append(self.free(gradient, place))

    def _pile_up(self, visits: Sequence[Visit[_Unit]]) -> None:
        """Flat gradients of earlier micro-batches, not reduced yet, there when the last one begins."""
        for visit in visits:
            if visit.unit.flat is not None and visit.unit.flat.is_trainable:
                size = Size.constant(visit.unit.flat.gradient_bytes)
                place = self.pile(visit.unit.group, visit.forward_begin)
                self.accumulated[place] = [Alloc(self.first_slot, size, Owner.GRADIENTS)]

    def _clock_gather(self, unit: _Unit, frame: Frame) -> None:
        if self.layout.num_shards == 1:
            return
        for flat in unit.flats:
            if self.layout.offloads:
                frame.copies.append(Copy(True, Size.constant(flat.stored_bytes), Moment.BEFORE))
            payload = Size.constant(flat.gathered_bytes)
            frame.collectives.append(Collective(CollectiveKind.ALL_GATHER, payload, Moment.BEFORE, self.layout.group))
            if flat.is_cast:
                moved = Size.constant(flat.stored_bytes + flat.cast_bytes)
                frame.kernels.append(Kernel(1, Size.constant(0), moved, False))

    def _clock_reduce(self, flat: _Flat, frame: Frame) -> None:
        self.clock_messages(frame, payload_bytes=flat.gathered_bytes, reduced_bytes=flat.cast_bytes)
        if self.layout.offloads:
            frame.copies.append(Copy(False, Size.constant(flat.stored_bytes), Moment.AFTER))
        frame.kernels.append(Kernel(1, Size.constant(0), Size.constant(2 * flat.gradient_bytes), False))


def _without_cast_adapters(program: StepProgram) -> StepProgram:
    """``program`` without autocast's 16-bit copies of adapters, which are gathered in 16 bits here: all that a forward
    pass makes whose size depends on the rank but neither on the batch nor on the length."""
    forward = {stage.name for stage in program.stages if stage.phase is Phase.FORWARD}

    def is_copy(event: Event, stage: Stage) -> bool:
        if isinstance(event, Alloc):
            return stage.name in forward and _is_of_rank(event.size)
        return isinstance(event, Free) and event.ref.stage in forward and _is_of_rank(event.size)

    def without(stage: Stage, section: Section) -> Section:
        return replace(section, events=tuple(event for event in section.events if not is_copy(event, stage)))

    for phase in (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD):
        program = map_sections(program, phase, without)
    return program


def _is_of_rank(size: Size) -> bool:
    return bool(size.terms) and all(t.lora_rank and not t.micro_batch and not t.seq_len for t in size.terms)


class _Adapters:
    """Adapters that are units of their own are reduced each as soon as its gradient is there."""

    def __init__(self, program: StepProgram, layout: Layout, units: dict[str, _Unit]) -> None:
        self.program = program
        self.layout = layout
        self.units = units

    def of(self, stage: Stage, section: Section) -> Section:
        """``section`` with its adapters' gradients replaced by the shards that they are reduced to."""
        unit = self.units[section.group]
        if not unit.adapters:
            return section
        trainable = [i for i, p in enumerate(self.program.groups[section.group].parameters) if p.trainable]
        flats = dict(zip(trainable, unit.adapters, strict=True))
        first = next_slot(section.events)
        events: list[Event] = []
        for event, ready in with_ready_gradients(section.events):
            events.append(event._replace(owner=Owner.TEMPORARIES, parameter=-1) if is_gradient(event) else event)
            for alloc in ready:
                events += self._reduced(stage.name, alloc, flats[alloc.parameter], first=first)
        payload = Size.constant(sum(flats[a.parameter].gathered_bytes for a in section.gradients))
        message = Collective(CollectiveKind.REDUCE_SCATTER, payload, Moment.AFTER, self.layout.group)
        collectives = (message,) if self.layout.num_shards > 1 and section.gradients else ()
        return replace(section, events=tuple(events), collectives=(*section.collectives, *collectives))

    def _reduced(self, stage: str, alloc: Alloc, flat: _Flat, *, first: int) -> Iterator[Event]:
        """The flat gradient takes the place of its only parameter's, the shard that of the flat gradient."""
        whole = Size.constant(flat.gradient_bytes)
        shard = Size.constant(flat.stored_bytes)
        yield Alloc(first, whole, Owner.COMMUNICATION)
        yield Free(local(stage, alloc.slot), alloc.size)
        kept = first + 1 + alloc.parameter
        if not self.layout.defers_reduction:
            yield Alloc(kept, shard, Owner.GRADIENTS, stream=Stream.REDUCE)
            if self.layout.accumulates:
                yield Free(local(stage, kept), shard)
        yield Free(local(stage, first), whole)


def _with_state(
    program: StepProgram, units: dict[str, _Unit], layout: Layout, *, scenario: Scenario, cluster: Cluster
) -> StepProgram:
    """``program`` with the shards, the optimizer on them and what earlier micro-batches left."""
    in_order = sorted(units.items(), key=lambda item: item[0] != ROOT_GROUP)  # the optimizer meets the root first
    flats = [(flat, program.group_counts[name]) for name, unit in in_order for flat in unit.flats]
    rank = _busiest_rank(flats, layout)
    trained = tuple(tensor for flat, count in flats for tensor in tuple(flat.trained_on(rank)) * count)
    persistent = [*program.persistent, *fsdp2.unsharded_scales(program)]
    on_host = 0
    if layout.offloads:
        shards = sum(flat.stored_bytes * count for flat, count in flats)
        on_host = shards + fsdp2.host_optimizer_bytes(trained, scenario=scenario)
    else:
        persistent += persistent_run(_repeated((flat.stored_bytes, n) for flat, n in flats), Owner.WEIGHTS)
        if layout.accumulates and not layout.defers_reduction:
            sizes = ((flat.stored_bytes, count) for flat, count in flats if flat.is_trainable)
            persistent += persistent_run(_repeated(sizes), Owner.GRADIENTS)
    program = replace(
        program,
        persistent=tuple(persistent),
        host_persistent_bytes=program.host_persistent_bytes + on_host,
        arrivals=tuple(_arrivals(program, units, scenario)),
    )
    step = OptimizerStep(tensors=trained, on_host=layout.offloads)
    return with_optimizer(program, step, scenario=scenario, device=cluster.gpu.device_kind)


def _arrivals(program: StepProgram, units: dict[str, _Unit], scenario: Scenario) -> Iterator[Arrival]:
    """Units are wrapped from the inside out, adapters before their block, the root last. accelerate has them sent
    (``sync_module_states``)."""
    is_sent = scenario.training.trainer is not Trainer.LOOP
    waits = scenario.training.method is Method.QLORA
    for name, unit in sorted(units.items(), key=lambda item: item[0] == ROOT_GROUP):
        flats = (*unit.adapters, *((unit.flat,) if unit.flat else ()))
        yield from [flat.arrival(is_sent=is_sent, waits=waits) for flat in flats] * program.group_counts[name]


def _repeated(sizes: Iterable[tuple[int, int]]) -> Iterator[int]:
    for size, count in sizes:
        yield from (size,) * count


def _busiest_rank(flats: Iterable[tuple[_Flat, int]], layout: Layout) -> int:
    """The rank whose shards hold the most trained elements: where only part of a flat parameter is trained, ranks
    differ in what their optimizers hold."""
    totals: Counter[int] = Counter({0: 0})
    for flat, count in flats:
        for first, last in flat.trained:
            for rank in range(first // flat.shard_numel, divide_up(last, flat.shard_numel)):
                begin, end = rank * flat.shard_numel, (rank + 1) * flat.shard_numel
                totals[rank] += count * (min(last, end) - max(first, begin))
    return max(totals, key=lambda rank: (totals[rank], -rank))
