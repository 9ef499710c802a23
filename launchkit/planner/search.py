"""The scenarios that a request leaves open, and the best batch of each by the cheap reading."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from launchkit import strategies
from launchkit.errors import MissingExtraError, TraceError
from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.plan import StepTime
from launchkit.planner.evaluate import Bench, communicators, step_time, usable_bytes
from launchkit.request import Request, default_prefetch, groups_text, precision_in, resolve, split_of, with_settings
from launchkit.scenario import (
    Batch,
    Checkpointing,
    DeviceKind,
    Method,
    Offload,
    Precision,
    Scenario,
    Sharding,
    Strategy,
    StrategyKind,
    TraceKey,
)
from launchkit.simulate.overheads import cuda_context, reservable_bytes
from launchkit.strategies.split import engines_of
from launchkit.units import round_up

DEFAULT_GLOBAL_BATCH = 32  # sequences per optimizer step where none is asked for: what most recipes use
LARGEST_MICRO_BATCH = 64

# What the allocator's rounding and fragmentation add to live bytes before it has been simulated. Real traces show
# 1.7 % to 14.2 %; the winner is run through the allocator, so this only keeps the search from proposing hopeless ones.
_ASSUMED_FRAGMENTATION = 0.02

# Engines by how much there is to set up and to go wrong: the earlier one is preferred when two are equally fast.
_SIMPLICITY = (
    StrategyKind.SINGLE,
    StrategyKind.DDP,
    StrategyKind.FSDP2,
    StrategyKind.ZERO1,
    StrategyKind.ZERO2,
    StrategyKind.ZERO3,
    StrategyKind.HSDP,
    StrategyKind.FSDP,
)

# How the job may be spread when nothing was asked for, by whether it has several GPUs.
_SPREAD_ONE: tuple[tuple[StrategyKind, Offload], ...] = (
    (StrategyKind.SINGLE, Offload.NONE),
    (StrategyKind.ZERO2, Offload.OPTIMIZER),
    (StrategyKind.ZERO3, Offload.ALL),
)
_SPREAD_MANY: tuple[tuple[StrategyKind, Offload], ...] = (
    (StrategyKind.DDP, Offload.NONE),
    (StrategyKind.FSDP2, Offload.NONE),
    (StrategyKind.ZERO2, Offload.NONE),
    (StrategyKind.ZERO3, Offload.NONE),
    (StrategyKind.HSDP, Offload.NONE),
    (StrategyKind.ZERO2, Offload.OPTIMIZER),
    (StrategyKind.ZERO3, Offload.OPTIMIZER),
    (StrategyKind.FSDP2, Offload.ALL),
    (StrategyKind.ZERO3, Offload.ALL),
)


# Engines that are not proposed for a method, though they can be asked for: ZeRO-1 and 2 shard gradients and optimizer
# states, of which adapters have next to none, and bitsandbytes' 4-bit weights are not sharded by ZeRO-3 either.
_WITHOUT_PURPOSE = {
    Method.FULL: (),
    Method.LORA: (StrategyKind.ZERO1, StrategyKind.ZERO2),
    Method.QLORA: (StrategyKind.ZERO1, StrategyKind.ZERO2, StrategyKind.ZERO3),
}


@dataclass(frozen=True, kw_only=True)
class Option:
    """The best batch found for one method, strategy and offload. ``live_bytes`` are its allocated peak by the cheap
    reading, ``fits`` says whether that leaves room on the device, and whether the host has room in every phase;
    ``asks_rare_host`` that it fits only on a host with more memory than is likely. ``step`` is its time, of one that
    fits."""

    scenario: Scenario
    live_bytes: int
    fits: bool
    step: StepTime | None = None
    asks_rare_host: bool = False

    @property
    def seconds(self) -> float:
        return self.step.seconds if self.step else float("inf")

    @property
    def simplicity(self) -> tuple[bool, int]:
        """Sorts offload behind none, and a simpler engine before another."""
        strategy = self.scenario.strategy
        return strategy.offload is not Offload.NONE, _SIMPLICITY.index(strategy.kind)


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A combination that was asked for and that the engine would refuse, with the reason."""

    scenario: Scenario
    reason: str


@dataclass(kw_only=True)
class Search:
    """Goes through what ``request`` leaves open on ``bench``. ``num_considered`` counts the scenarios read."""

    bench: Bench
    request: Request
    num_considered: int = 0

    @property
    def _profile(self) -> ModelProfile:
        return self.bench.source.profile

    @property
    def _cluster(self) -> Cluster:
        return self.bench.cluster

    def methods(self) -> tuple[Method, ...]:
        """What may be trained, in the order of preference: full, then LoRA, then QLoRA."""
        if self.request.method is not None:
            return (self.request.method,)
        if self.request.freeze is not None:  # which is of a full fine-tune
            return (Method.FULL,)
        if self._cluster.gpu.device_kind is DeviceKind.CPU:
            return (Method.FULL, Method.LORA)
        return tuple(Method)

    def strategies(self) -> Iterator[Strategy]:
        """How the job may be spread, within what was asked for."""
        request = self.request
        spread, split = self._spread(), split_of(request)
        if request.strategy is not None:
            offloads = [offload for kind, offload in (*_SPREAD_ONE, *_SPREAD_MANY) if kind is request.strategy]
            spread = tuple((request.strategy, offload) for offload in dict.fromkeys((Offload.NONE, *offloads)))
        if request.offload is not None:
            kinds = dict.fromkeys(kind for kind, _ in spread)
            spread = tuple((kind, request.offload) for kind in kinds)
        for kind, offload in spread:
            if kind is StrategyKind.HSDP and self._cluster.num_nodes == 1 and request.strategy is None:
                continue
            strategy = replace(_strategy(kind, offload), split=split)
            if request.fsdp_sharding is not None and kind.is_fsdp:
                strategy = replace(strategy, fsdp=replace(strategy.fsdp, sharding=request.fsdp_sharding))
            if request.fp8_all_gather is not None:
                strategy = replace(strategy, fsdp=replace(strategy.fsdp, float8_all_gather=request.fp8_all_gather))
            prefetch = default_prefetch(request.trainer)
            strategy = replace(strategy, fsdp=replace(strategy.fsdp, backward_prefetch=prefetch))
            is_asked = request.strategy is not None
            yield with_settings(strategy, request, hidden_size=self._profile.hidden_size, strict=is_asked)

    def expected_keys(self) -> Iterator[TraceKey]:
        """The programs that the search will likely read, in the order in which it gets to them."""
        least = [
            self.base(method, strategy)
            for method in self.methods()
            for strategy in self.strategies()
            if strategy.offload in (Offload.NONE, self.request.offload) and not self._is_pointless(method, strategy)
        ]
        least = [s for s in least if strategies.refusal(s, self._profile, self.bench.cluster_of(s)) is None]
        full = [scenario for scenario in least if scenario.training.method is Method.FULL]
        adapters = [scenario for scenario in least if scenario.training.method is not Method.FULL]
        yield from map(self.bench.key, full)
        for scenarios in (adapters, full):
            for checkpointing in self._checkpointings():
                for scenario in scenarios:
                    *_, largest = self._micro_batches(scenario)
                    yield self.bench.key(self._with(scenario, checkpointing, largest))

    def _with(self, scenario: Scenario, checkpointing: Checkpointing, micro_batch: int) -> Scenario:
        training = replace(scenario.training, checkpointing=checkpointing)
        batch = self._batch(micro_batch, scenario.batch.seq_len, scenario.strategy)
        return replace(scenario, training=training, batch=batch)

    def _is_pointless(self, method: Method, strategy: Strategy) -> bool:
        return strategy.kind in _WITHOUT_PURPOSE[method] and self.request.strategy is None

    def _spread(self) -> tuple[tuple[StrategyKind, Offload], ...]:
        """The engines and offloads to try where none was asked for."""
        split, num_gpus = split_of(self.request), self._cluster.num_gpus
        if split.num_ranks == 1:
            return _SPREAD_ONE if num_gpus == 1 else _SPREAD_MANY
        alone = _SPREAD_ONE[:1] if split.num_ranks == num_gpus else ()
        return tuple((kind, offload) for kind, offload in (*alone, *_SPREAD_MANY) if kind in engines_of(split))

    def base(self, method: Method, strategy: Strategy) -> Scenario:
        """The scenario of a method and a strategy before a batch is chosen: micro-batch 1 and full checkpointing,
        which needs the least memory, unless something else was asked for."""
        usual = default_precision(method, self._cluster)
        request = replace(
            self.request,
            method=method,
            strategy=StrategyKind.SINGLE,
            offload=None,
            fsdp_sharding=None,
            fp8_all_gather=None,
            ddp_settings=None,
            fsdp_settings=None,
            zero_settings=None,
            micro_batch=None,
            global_batch=None,
            precision=self.request.precision or precision_in(self.request.trainer, strategy.kind, usual=usual),
        )
        scenario = resolve(request, model=self._profile, cluster=self._cluster).scenario
        training = replace(scenario.training, checkpointing=self.request.checkpointing or Checkpointing.FULL)
        micro_batch = self.request.micro_batch or 1
        return replace(
            scenario,
            strategy=strategy,
            training=training,
            batch=self._batch(micro_batch, scenario.batch.seq_len, strategy),
        )

    def options(self, method: Method, *, offload: bool) -> Iterator[Option | Refused]:
        """The best batch of every strategy, of those with or those without offload."""
        for strategy in self.strategies():
            if (strategy.offload is not Offload.NONE) is not offload:
                continue
            if self._is_pointless(method, strategy):
                continue
            scenario = self.base(method, strategy)
            reason = self._batch_refusal(scenario)
            reason = reason or strategies.refusal(scenario, self._profile, self.bench.cluster_of(scenario))
            if reason is not None:
                yield Refused(scenario=scenario, reason=reason)
                continue
            try:
                yield self.best_batch(scenario)
            except (TraceError, MissingExtraError) as error:
                yield Refused(scenario=scenario, reason=str(error))

    def best_batch(self, least: Scenario) -> Option:
        """The fastest batch and checkpointing that fit; the least demanding ones where none do."""
        if least.training.method is Method.FULL and not (smallest := self._smallest(least)).fits:
            return smallest  # read first, since it is often too large as it is; adapters seldom are
        return self._fastest(least) or self._smallest(least)

    def next_batch(self, scenario: Scenario, *, tried: Collection[Scenario]) -> Option | None:
        """The best batch and checkpointing for the method and strategy of ``scenario`` that need less than those
        ``tried``, none of which fits; None where there are none."""
        return self._fastest(self.base(scenario.training.method, scenario.strategy), tried=tried)

    def _fastest(self, least: Scenario, *, tried: Collection[Scenario] = ()) -> Option | None:
        """Of every checkpointing the largest micro-batch that fits and was not tried, and of those the fastest."""
        largest = map(partial(self._largest, least, tried=tried), self._checkpointings())
        found = [self._timed(option) for option in largest if option]
        return min(found, key=lambda option: (option.seconds, option.live_bytes), default=None)

    def _checkpointings(self) -> tuple[Checkpointing, ...]:
        asked = self.request.checkpointing
        return (Checkpointing.FULL, Checkpointing.NONE) if asked is None else (asked,)

    def _smallest(self, least: Scenario) -> Option:
        """``least``, or the same batch without accumulation where that alone fits or needs less."""
        option = self.read(least)
        if option.fits or not _keeps_whole_gradients(least):
            return option
        at_once = self.read(self._without_accumulation(least))
        return at_once if at_once.fits else min(option, at_once, key=lambda option: option.live_bytes)

    def _largest(
        self, least: Scenario, checkpointing: Checkpointing, *, tried: Collection[Scenario] = ()
    ) -> Option | None:
        """The largest micro-batch that fits and was not tried, which is the fastest."""
        for micro_batch in reversed(tuple(self._micro_batches(least))):
            scenario = self._with(least, checkpointing, micro_batch)
            if scenario in tried:
                continue
            if self.bench.least_live_bytes(scenario) > self.room_bytes(scenario):
                self.num_considered += 1
            elif (option := self.read(scenario)).fits:
                return option
        return None

    def _without_accumulation(self, scenario: Scenario) -> Scenario:
        """The same global batch in one pass, where that is a micro-batch to be tried."""
        *_, largest = self._micro_batches(scenario)
        return self._with(scenario, scenario.training.checkpointing, largest)

    def _micro_batches(self, scenario: Scenario) -> Iterator[int]:
        """Micro-batches to try, smallest first; those that keep the global batch whole."""
        if self.request.micro_batch is not None:
            yield self.request.micro_batch
            return
        ranks = scenario.strategy.num_data_ranks(self._cluster.num_gpus)
        per_rank = max(1, self.global_batch() // ranks)
        micro_batch = 1
        while micro_batch <= min(per_rank, LARGEST_MICRO_BATCH):
            if per_rank % micro_batch == 0:
                yield micro_batch
            micro_batch *= 2

    def global_batch(self) -> int:
        """Sequences per optimizer step: what was asked for, else 32 or as many as there are GPUs, in whole shares."""
        asked = self.request.global_batch
        if asked is not None:
            return asked
        ranks = max(1, self._cluster.num_gpus // split_of(self.request).num_ranks)
        return max(ranks, DEFAULT_GLOBAL_BATCH // ranks * ranks)

    def _batch(self, micro_batch: int, seq_len: int, strategy: Strategy) -> Batch:
        ranks = max(1, strategy.num_data_ranks(self._cluster.num_gpus))
        steps = max(1, self.global_batch() // (ranks * micro_batch))
        return Batch(micro_batch=micro_batch, gradient_accumulation_steps=steps, seq_len=seq_len)

    def _batch_refusal(self, scenario: Scenario) -> str | None:
        """Why a global batch that was asked for cannot be kept, with the next one that can."""
        asked, strategy = self.request.global_batch, scenario.strategy
        ranks = max(1, strategy.num_data_ranks(self._cluster.num_gpus))
        if asked is None or scenario.batch.global_batch(ranks) == asked:
            return None
        parts = [f"--micro-batch {self.request.micro_batch}"] if self.request.micro_batch else []
        parts += [groups_text(strategy, ranks)] if ranks > 1 else []
        fitting = round_up(asked, ranks * scenario.batch.micro_batch)
        return f"--global-batch {asked} is no multiple of {' × '.join(parts)}; use --global-batch {fitting}"

    def read(self, scenario: Scenario) -> Option:
        """By the cheap reading: whether there is room for it on the device, and on the host where that is known."""
        self.num_considered += 1
        live = self.bench.live_peak_bytes(scenario)
        fits = live <= self.room_bytes(scenario)
        fits = fits and self.bench.host_shortage(scenario) is None
        is_rare = fits and self.bench.asks_rare_host(scenario)
        return Option(scenario=scenario, live_bytes=live, fits=fits, asks_rare_host=is_rare)

    def room_bytes(self, scenario: Scenario) -> int:
        """Live bytes that leave room for everything else on the device, at the top of its range."""
        cluster = self.bench.cluster_of(scenario)
        outside = cuda_context(cluster.gpu).plus(communicators(cluster, scenario))
        fragmentation = _ASSUMED_FRAGMENTATION if cluster.gpu.device_kind is DeviceKind.CUDA else 0
        return round(reservable_bytes(usable_bytes(cluster), outside) / (1 + fragmentation))

    def _timed(self, option: Option) -> Option:
        return replace(option, step=step_time(self.bench, option.scenario))


def _keeps_whole_gradients(scenario: Scenario) -> bool:
    """Whether micro-batches are added up in gradients that are not sharded, which one large micro-batch does without:
    FSDP under accelerate's ``no_sync``. Adapters have too few gradients for that to matter."""
    accumulates = scenario.batch.gradient_accumulation_steps > 1
    return accumulates and scenario.strategy.kind.is_fsdp and scenario.training.method is Method.FULL


def default_precision(method: Method, cluster: Cluster) -> Precision:
    """What is trained in when nothing was asked for: bf16 with fp32 masters for a full fine-tune, adapters on bf16
    weights else; fp16 where the GPU has no bf16; fp32 on a CPU."""
    if cluster.gpu.device_kind is DeviceKind.CPU:
        return Precision.FP32
    if not cluster.gpu.supports_bf16:
        return Precision.FP16
    return Precision.BF16 if method is Method.FULL else Precision.BF16_PARAMS


def _strategy(kind: StrategyKind, offload: Offload) -> Strategy:
    strategy = Strategy(kind=kind, offload=offload)
    if kind is StrategyKind.HSDP:
        return replace(strategy, fsdp=replace(strategy.fsdp, sharding=Sharding.HYBRID_SHARD))
    if kind.is_fsdp and offload.params:
        return replace(strategy, fsdp=replace(strategy.fsdp, offload_params=True))
    return strategy
