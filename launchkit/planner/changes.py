"""What to change in a scenario that somebody else chose: one setting at a time, and together until it fits.

``plan`` searches; here the scenario is given, and what is said of it is how far each step away from it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from launchkit import strategies
from launchkit.errors import LaunchkitError
from launchkit.hardware import Cluster
from launchkit.plan import Candidate
from launchkit.planner.evaluate import Bench, sketch
from launchkit.planner.search import Search
from launchkit.program import Owner
from launchkit.request import Request
from launchkit.scenario import (
    UNSHARDED,
    Checkpointing,
    DeviceKind,
    FsdpSettings,
    Loss,
    Method,
    Offload,
    Precision,
    Scenario,
    Strategy,
    StrategyKind,
    Trainer,
)

SHORTEST_SEQUENCE = 128
_MOST_HALVINGS = 6  # 8192 to 128 tokens
_LARGE_LOGITS_SHARE = 0.2  # of the peak: worth tracing another loss for
_WORTHWHILE_SHARE = 0.02  # of the peak: less is within what any estimate is off by
_WORTHWHILE_SPEED = 0.97  # of the step's time
_MOST_GPUS = 1024

Alteration = Callable[[Scenario, Cluster], Scenario | None]


@dataclass(frozen=True, kw_only=True)
class Change:
    """An altered scenario beside the one that was given. ``saved_bytes`` are of the allocated peak, negative where it
    takes more; ``time_factor`` is of an optimizer step over as many tokens, 0 where these differ."""

    candidate: Candidate
    saved_bytes: int
    time_factor: float
    fits: bool


def fully_checkpointed(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    if scenario.training.checkpointing not in (Checkpointing.NONE, Checkpointing.SELECTIVE):
        return None
    return replace(scenario, training=replace(scenario.training, checkpointing=Checkpointing.FULL))


def with_half_micro_batch(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    """Or a third of 3: of the same global batch."""
    batch = scenario.batch
    half = batch.micro_batch // 2
    if not half or batch.micro_batch % half:
        return None
    steps = batch.gradient_accumulation_steps * (batch.micro_batch // half)
    return replace(scenario, batch=replace(batch, micro_batch=half, gradient_accumulation_steps=steps))


def _with_fused_loss(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    """Liger's; TRL's own in chunks saves nearly as much, and the plain loop calls what it likes."""
    training = scenario.training
    if training.loss is not Loss.PLAIN or training.trainer is Trainer.TRL:
        return None
    return replace(scenario, training=replace(training, loss=Loss.LIGER))


def _sharded(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    """FSDP2 in place of copies, ZeRO-3 in place of the stages that keep whole weights."""
    kind, training = scenario.strategy.kind, scenario.training
    if cluster.num_gpus == 1 or scenario.strategy.split.num_ranks > 1:
        return None
    if kind in (StrategyKind.ZERO1, StrategyKind.ZERO2):
        return replace(scenario, strategy=replace(scenario.strategy, kind=StrategyKind.ZERO3))
    if kind not in UNSHARDED:
        return None
    if training.checkpointing is not Checkpointing.NONE:
        training = replace(training, checkpointing=Checkpointing.FULL)  # the one kind that FSDP has
    upcasts = training.trainer is Trainer.AXOLOTL or training.method is Method.FULL
    if upcasts and training.precision is Precision.BF16_PARAMS:
        training = replace(training, precision=Precision.BF16)  # what autocast makes of FSDP's shards
    return replace(scenario, strategy=Strategy(kind=StrategyKind.FSDP2), training=training)


def _with_8bit_states(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    """torchao's under FSDP2, which shards it; bitsandbytes' elsewhere. Of adapters the states are small."""
    training = scenario.training
    if training.method is not Method.FULL or training.optimizer not in ("adamw_torch", "adamw_torch_fused"):
        return None
    is_fsdp2 = scenario.strategy.kind in (StrategyKind.FSDP2, StrategyKind.HSDP)
    name = "adamw_torch_8bit" if is_fsdp2 else "adamw_bnb_8bit"
    return replace(scenario, training=replace(training, optimizer=name))


def _in_4_bits(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    if scenario.training.method is not Method.LORA:
        return None
    return replace(scenario, training=replace(scenario.training, method=Method.QLORA))


def _offloaded(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    strategy = scenario.strategy
    if strategy.offload is not Offload.NONE or strategy.offloads_params:
        return None
    if strategy.kind.zero_stage:
        return replace(scenario, strategy=replace(strategy, offload=Offload.OPTIMIZER))
    if not strategy.kind.is_fsdp:
        return None
    fsdp: FsdpSettings = replace(strategy.fsdp, offload_params=True)
    return replace(scenario, strategy=replace(strategy, offload=Offload.PARAMS, fsdp=fsdp))


def _adapted(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    """LoRA in place of a full fine-tune, which trains something else."""
    training = scenario.training
    if training.method is not Method.FULL or training.freeze or training.precision is Precision.FP8:
        return None
    keeps_fp32 = scenario.strategy.kind.zero_stage or training.trainer is Trainer.AXOLOTL
    if training.precision is Precision.BF16 and not keeps_fp32:
        training = replace(training, precision=Precision.BF16_PARAMS)  # nothing trains the base's fp32 copy
    return replace(scenario, training=replace(training, method=Method.LORA))


def _with_half_length(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    length = scenario.batch.seq_len // 2
    if length < SHORTEST_SEQUENCE:
        return None
    return replace(scenario, batch=replace(scenario.batch, seq_len=length))


def _unchecked(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    if scenario.training.checkpointing is Checkpointing.NONE:
        return None
    return replace(scenario, training=replace(scenario.training, checkpointing=Checkpointing.NONE))


def _with_double_micro_batch(scenario: Scenario, cluster: Cluster) -> Scenario | None:
    batch = scenario.batch
    if batch.gradient_accumulation_steps % 2:
        return None
    steps = batch.gradient_accumulation_steps // 2
    return replace(scenario, batch=replace(batch, micro_batch=batch.micro_batch * 2, gradient_accumulation_steps=steps))


# By how little they change of what is learned, then by how little time they take.
SAVINGS: tuple[Alteration, ...] = (
    _with_fused_loss,
    fully_checkpointed,
    with_half_micro_batch,
    _sharded,
    _in_4_bits,
    _with_8bit_states,
    _offloaded,
    _with_half_length,
    _adapted,
)
# Of these, what is worth saying where it fits: they leave what is learned and where it runs as they are.
_HARMLESS = SAVINGS[:3]
SPEEDUPS: tuple[Alteration, ...] = (_unchecked, _with_double_micro_batch)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """``singles`` alter one setting each, those first that are enough; ``together`` alters as few as are needed where
    none is enough, or only shorter sequences are; ``more_gpus`` is the smallest multiple of the cluster that has room
    for the scenario, sharded, where it does not fit."""

    singles: tuple[Change, ...] = ()
    together: Change | None = None
    more_gpus: tuple[Cluster, StrategyKind] | None = None


def changes(bench: Bench, given: Candidate) -> Changes:
    """What would save memory in ``given``, or time where it fits, by readings of live bytes alone."""
    trial = _Trial(bench=bench, search=Search(bench=bench, request=Request()), given=given)
    if given.estimate.fits:
        return Changes(singles=(*trial.speedups(), *trial.savings(_HARMLESS)))
    singles = sorted(trial.savings(SAVINGS), key=lambda change: (not change.fits, -change.saved_bytes))
    is_enough = any(change.fits and change.time_factor for change in singles)  # with as many tokens
    together = None if is_enough else trial.together()
    return Changes(singles=tuple(singles), together=together, more_gpus=_more_gpus(bench, given.scenario))


@dataclass(kw_only=True)
class _Trial:
    """One given scenario and what is tried on it."""

    bench: Bench
    search: Search
    given: Candidate

    def savings(self, alterations: Sequence[Alteration]) -> Iterator[Change]:
        for alteration in alterations:
            change = self._shortened() if alteration is _with_half_length else self._change((alteration,))
            if change and change.saved_bytes > _WORTHWHILE_SHARE * self.given.estimate.allocated_peak_bytes:
                yield change

    def _shortened(self) -> Change | None:
        """Half the length, or what is left of it when it fits."""
        half = self._change((_with_half_length,))
        tries = (self._change((_with_half_length,) * times) for times in range(1, _MOST_HALVINGS + 1))
        return next((change for change in tries if change and change.fits), half)

    def speedups(self) -> Iterator[Change]:
        for alteration in SPEEDUPS:
            change = self._change((alteration,))
            if change and change.fits and 0 < change.time_factor < _WORTHWHILE_SPEED:
                yield change

    def together(self) -> Change | None:
        """Alterations in their order until it fits, then without those that were not needed."""
        taken: list[Alteration] = []
        for alteration in (*SAVINGS, *(_with_half_length,) * (_MOST_HALVINGS - 1)):
            change = self._change((*taken, alteration))
            if change is None:
                continue
            taken.append(alteration)
            if change.fits:
                return self._change(self._needed(taken))
        return None

    def _needed(self, taken: Sequence[Alteration]) -> tuple[Alteration, ...]:
        """Without what can be spared, the least welcome first."""
        needed = tuple(taken)
        for alteration in reversed(taken[:-1]):
            rest = tuple(other for other in needed if other is not alteration)
            change = self._change(rest)
            if change is not None and change.fits:
                needed = rest
        return needed

    def _change(self, alterations: Sequence[Alteration]) -> Change | None:
        """None where an alteration does not apply, the engine refuses it, or its program is not at hand."""
        scenario: Scenario | None = self.given.scenario
        for alteration in alterations:
            scenario = scenario and alteration(scenario, self.bench.cluster)
        if scenario is None or not self._is_possible(scenario, traces=_with_fused_loss in alterations):
            return None
        try:
            candidate = sketch(self.bench, scenario)
        except LaunchkitError:
            return None
        same_length = scenario.batch.seq_len == self.given.scenario.batch.seq_len
        seconds = self.given.step.seconds
        return Change(
            candidate=candidate,
            saved_bytes=self.given.estimate.allocated_peak_bytes - candidate.estimate.allocated_peak_bytes,
            time_factor=candidate.step.seconds / seconds if same_length and seconds else 0.0,
            fits=self.search.read(scenario).fits,
        )

    def _is_possible(self, scenario: Scenario, *, traces: bool) -> bool:
        """``traces``: a program that is not at hand is waited for, where logits are what is too much."""
        cluster = self.bench.cluster_of(scenario)
        if strategies.refusal(scenario, self.bench.source.profile, cluster) is not None:
            return False
        estimate = self.given.estimate
        logits = estimate.at_peak.get(Owner.LOGITS, 0)
        waits = traces and not estimate.fits and logits > _LARGE_LOGITS_SHARE * estimate.allocated_peak_bytes
        return waits or self.bench.source.has_program(self.bench.key(scenario))


def _more_gpus(bench: Bench, scenario: Scenario) -> tuple[Cluster, StrategyKind] | None:
    """The scenario on twice as many GPUs, and so on; copies become shards, of which more GPUs make smaller ones."""
    cluster = bench.cluster
    if cluster.gpu.device_kind is DeviceKind.CPU or scenario.strategy.split.num_ranks > 1:
        return None
    for wider in wider_clusters(cluster):
        wide = _sharded(scenario, wider) or scenario
        wide_bench = Bench(source=bench.source, cluster=wider)
        try:
            if Search(bench=wide_bench, request=Request()).read(wide).fits:
                return wider, wide.strategy.kind
        except LaunchkitError:
            return None
    return None


def wider_clusters(cluster: Cluster) -> Iterator[Cluster]:
    """Twice as many GPUs, four times, and so on."""
    for factor in (2, 4, 8, 16, 32, 64):
        wider = _widened(cluster, factor)
        if wider.num_gpus > _MOST_GPUS:
            return
        yield wider


def _widened(cluster: Cluster, factor: int) -> Cluster:
    """``factor`` times the GPUs: in the node up to eight, in more nodes beyond."""
    in_node = min(max(8, cluster.node.num_gpus), cluster.node.num_gpus * factor)
    nodes = cluster.num_nodes * cluster.node.num_gpus * factor // in_node
    return replace(cluster, num_nodes=nodes, node=replace(cluster.node, num_gpus=in_node, name=""))
