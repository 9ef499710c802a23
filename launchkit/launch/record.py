"""What a run left behind: per rank what was measured, beside what the plan predicted."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from launchkit.plan import Candidate
from launchkit.scenario import StrategyKind
from launchkit.serialize import decode, encode
from launchkit.units import count, duration, gib

SCHEMA_VERSION = 1


class Metric(StrEnum):
    """What a measured peak counts. Only a metric with a predicted counterpart is compared."""

    CUDA_ALLOCATED = "cuda-allocated"  # torch.cuda.max_memory_allocated
    CPU_ALLOCATOR = "cpu-allocator"  # every allocation of torch's CPU allocator, from its profiler
    RSS = "rss"  # resident set of the process: interpreter and libraries included


_METRIC_TEXT: Mapping[Metric, str] = {
    Metric.CUDA_ALLOCATED: "allocated on the GPU",
    Metric.CPU_ALLOCATOR: "allocated by torch",
    Metric.RSS: "resident set",
}

FSDP1_WRAPPER = "FullyShardedDataParallel"
# The class that a strategy's wrapper must have among its bases, by which a rank proves that the strategy is live.
WRAPPERS: Mapping[StrategyKind, str] = {
    StrategyKind.DDP: "DistributedDataParallel",
    StrategyKind.FSDP: FSDP1_WRAPPER,
    StrategyKind.FSDP2: "FSDPModule",
    StrategyKind.HSDP: "FSDPModule",
    StrategyKind.ZERO1: "DeepSpeedEngine",
    StrategyKind.ZERO2: "DeepSpeedEngine",
    StrategyKind.ZERO3: "DeepSpeedEngine",
}


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What one rank saw of its strategy in a running step: wrapper classes, world size, sizes and dtypes held here."""

    wrappers: tuple[str, ...] = ()
    world_size: int = 1
    backend: str = ""
    zero_stage: int = 0
    num_parameters: int = 0
    num_local_parameters: int = 0
    num_optimizer_parameters: int = 0
    parameter_dtypes: Mapping[str, int] = field(default_factory=dict)
    optimizer_state_dtypes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """One rank's measurements. Peaks are 0 where the metric does not exist or the run was too short for a second step.

    Of the peak ``unseen_frees_bytes`` may have been free already: the profiler misses what gloo's threads free.
    ``tokens_per_step`` is 0 for a script of the user's own, whose batches nobody knows.
    """

    rank: int
    device: str
    metric: Metric
    first_peak_bytes: int = 0
    steady_peak_bytes: int = 0
    reserved_peak_bytes: int = 0
    unseen_frees_bytes: int = 0
    device_used_bytes: int = 0
    max_rss_bytes: int = 0
    num_steps: int = 0
    step_seconds: tuple[float, ...] = ()
    tokens_per_step: int = 0
    longest_tokens: int = 0
    proof: Proof | None = None
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The steady peak, or the first step's when there was no second one."""
        return self.steady_peak_bytes or self.first_peak_bytes

    @property
    def steady_step_seconds(self) -> float:
        """The median step after the first; 0 when unknown."""
        later = self.step_seconds[1:] or self.step_seconds
        return statistics.median(later) if later else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.steady_step_seconds if self.steady_step_seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run: how it was started and ended, what was predicted and measured. The content of ``result.json``."""

    run_dir: str
    command: tuple[str, ...]
    engine: str
    strategy: str
    exit_code: int
    seconds: float
    predicted: Mapping[str, int | float]
    ranks: tuple[RankRecord, ...] = ()
    strategy_is_live: bool | None = None  # None: no rank could tell
    failure: str = ""
    log: str = ""
    stopped_by: str = ""  # the signal that launchkit was sent and handed on: SIGINT, SIGTERM, SIGHUP
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def ending(self) -> str:
        """How a run ended that did not succeed, in a few words; empty for one that did."""
        if self.stopped_by:
            how = "interrupted" if self.stopped_by == "SIGINT" else f"stopped by {self.stopped_by}"
            return f"{how}; every process is gone"
        return f"the run failed with exit code {self.exit_code}: {self.failure}" if self.exit_code else ""

    @property
    def other_model(self) -> str:
        """What was trained where it cannot be the planned model, by the number of parameters; else empty.

        Formula: a factor of two, since adapters add to the number and 4-bit weights count as their storage. FSDP1's
        flat parameters do not tell.
        """
        planned = self.predicted.get("num_parameters", 0)
        proofs = [rank.proof for rank in self.ranks if rank.proof is not None and rank.proof.num_parameters]
        if not planned or not proofs or any(FSDP1_WRAPPER in wrapper for wrapper in proofs[0].wrappers):
            return ""
        trained = proofs[0].num_parameters
        if planned / 2 <= trained <= planned * 2:
            return ""
        return f"{count(trained)} parameters were trained, the plan is for {count(planned)}"

    @property
    def document(self) -> dict[str, Any]:
        """As JSON values, with its schema version."""
        return {"schema_version": SCHEMA_VERSION, **encode(self)}


def predicted_values(candidate: Candidate) -> dict[str, int | float]:
    """The numbers of a candidate that a run can be held against. Memory is the largest rank's."""
    estimate, step = candidate.estimate, candidate.step
    return {
        "num_parameters": candidate.num_parameters,
        "allocated_peak_bytes": estimate.allocated_peak_bytes,
        "reserved_peak_bytes": estimate.reserved_peak_bytes,
        "device_peak_bytes": estimate.device_peak_bytes,
        "device_peak_low_bytes": estimate.device_peak_low_bytes,
        "device_peak_high_bytes": estimate.device_peak_high_bytes,
        "step_seconds": step.seconds,
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
    }


def rank_record(document: Mapping[str, Any]) -> RankRecord:
    """Reads the content of ``rank<k>.json``."""
    record = decode(RankRecord, document, path="")
    assert isinstance(record, RankRecord)
    return record


def strategy_is_live(kind: StrategyKind, ranks: Sequence[RankRecord], *, world_size: int) -> bool | None:
    """Whether every rank saw the wrapper and the world that the strategy means; None when no rank left a proof."""
    proofs = [rank.proof for rank in ranks if rank.proof is not None]
    if not proofs:
        return None
    return all(_is_proven(kind, proof, world_size=world_size) for proof in proofs)


def _is_proven(kind: StrategyKind, proof: Proof, *, world_size: int) -> bool:
    if kind is StrategyKind.SINGLE:  # of several ranks each holds a part
        is_split = proof.num_local_parameters < proof.num_parameters
        return proof.world_size == world_size and is_split is (world_size > 1)
    is_wrapped = any(WRAPPERS[kind] in wrapper for wrapper in proof.wrappers)
    return is_wrapped and proof.world_size == world_size and proof.zero_stage == kind.zero_stage


def comparison_text(record: RunRecord) -> str:
    """Predicted beside measured, a few lines, and what is to be noted of it."""
    return "\n".join([*comparison_lines(record), *(f"note: {note}" for note in record.notes)])


def comparison_lines(record: RunRecord) -> tuple[str, ...]:
    """Predicted beside measured: memory of the largest rank, speed, whether the strategy was live."""
    return tuple(line for line in (_memory_line(record), _speed_line(record), _live_line(record)) if line)


def _memory_line(record: RunRecord) -> str:
    if not any(rank.num_steps for rank in record.ranks):
        return "" if record.ending else "memory: no rank left a measurement"
    largest = max(record.ranks, key=lambda rank: rank.peak_bytes)
    when = "steady step" if largest.steady_peak_bytes else "first step"
    low = gib(largest.peak_bytes - largest.unseen_frees_bytes, digits=2)
    high = gib(largest.peak_bytes, digits=2)
    measured = f"memory: measured {high if low == high else f'{low} to {high}'} {_METRIC_TEXT[largest.metric]}"
    measured += f" (largest rank {largest.rank}, {when})"
    if record.other_model:
        return f"{measured} · not compared: {record.other_model}"
    predicted = record.predicted.get("allocated_peak_bytes", 0)
    if largest.metric is Metric.RSS or not predicted or not largest.peak_bytes:
        return measured
    return f"{measured} · predicted {gib(predicted, digits=2)} ({_error(predicted, largest):+.1%})"


def _error(predicted_bytes: float, rank: RankRecord) -> float:
    """Relative to the measured peak, or to the nearest value that it may have had."""
    nearest = min(max(predicted_bytes, rank.peak_bytes - rank.unseen_frees_bytes), rank.peak_bytes)
    return predicted_bytes / nearest - 1


def _speed_line(record: RunRecord) -> str:
    timed = [rank for rank in record.ranks if rank.steady_step_seconds]
    if not timed:
        return ""
    slowest = max(timed, key=lambda rank: rank.steady_step_seconds)
    line = f"speed: measured {duration(slowest.steady_step_seconds)} per step"
    if slowest.tokens_per_second:
        line += f", {slowest.tokens_per_second:,.0f} tokens/s per process"
    predicted = record.predicted.get("step_seconds", 0.0)
    return f"{line} · predicted {duration(predicted)}" if predicted and not record.other_model else line


def _live_line(record: RunRecord) -> str:
    if record.strategy_is_live is None:
        return ""
    if not record.strategy_is_live:
        return f"strategy: {record.strategy} was NOT in force on every rank; see rank<k>.json, field proof"
    proof = next(rank.proof for rank in record.ranks if rank.proof is not None)
    wrapper = f" ({proof.wrappers[0]})" if proof.wrappers else ""
    return f"strategy: {record.strategy} in force on {len(record.ranks)} of {proof.world_size} processes{wrapper}"
