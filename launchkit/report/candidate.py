"""What is said of one candidate, in lines that several screens share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import NamedTuple

from launchkit.hardware import Backend, Cluster
from launchkit.model import ModelProfile
from launchkit.plan import Candidate, DataUse, Estimate, RunPhase, StepTime
from launchkit.report.text import Canvas, Ink, MemoryScale, bar
from launchkit.report.verdict import Verdict, asks_rare_host, verdict
from launchkit.scenario import Checkpointing, Method, Precision, Scenario, StrategyKind, Training
from launchkit.units import duration, gib, gigabytes

INDENT = "   "
OVERHEAD_KEYS = ("cuda_context", "nccl", "fragmentation")
# The order of the bars: what stays, what the step makes, what comes on top. Each label sums the keys beside it.
OWNERS: Mapping[str, tuple[str, ...]] = {
    "weights": ("weights",),
    "gathered": ("gathered_weights",),
    "master": ("master_weights",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer_states",),
    "activations": ("activations",),
    "logits": ("logits",),
    "temporary": ("temporaries",),
    "buckets": ("communication",),
    "inputs": ("inputs",),
    "cuda+nccl+slack": OVERHEAD_KEYS,
}
LONG_WRITE_SECONDS = 60.0  # of a checkpoint; shorter ones are told with -v
SMALLEST_SHOWN = 0.005  # of the peak; what is below is left to the JSON


def headline(candidate: Candidate, *, cluster: Cluster, canvas: Canvas) -> list[str]:
    """The verdict line: mark, method, strategy, precision, batch."""
    judged = verdict(candidate.estimate)
    mark, ink = judged.mark, judged.ink
    parts = describe(candidate.scenario, cluster=cluster)
    if judged is Verdict.FITS and asks_rare_host(candidate.estimate, cluster):
        mark, ink = "?", Ink.CARE
        parts = [f"fits if {_host(cluster)} has {gib(candidate.estimate.host_needed_bytes)}", *parts]
    if judged is Verdict.NARROW:
        parts = ["fits only within the error band", *parts]
    if judged is Verdict.DOES_NOT_FIT:
        parts = ["does not fit", *parts]
    lines = canvas.flow(parts, first=f" {mark} ", rest=INDENT, separator=" · ")
    return [canvas.paint(line, ink) for line in lines]


def _host(cluster: Cluster) -> str:
    return "the host" if cluster.num_nodes == 1 else "each host"


def describe(scenario: Scenario, *, cluster: Cluster) -> list[str]:
    """A scenario in full, part by part."""
    training = scenario.training
    extras = {
        f"{training.checkpointing} checkpointing": training.checkpointing is not Checkpointing.NONE,
        f"{training.loss} loss": training.loss.value != "plain",
        "compiled": training.compile,
        "first step": scenario.state.value == "first",
    }
    return [
        method_text(training),
        strategy_text(scenario, cluster=cluster),
        training.precision.value,
        *(text for text, applies in extras.items() if applies),
        batch_text(scenario, cluster=cluster),
    ]


def model_name(model: ModelProfile) -> str:
    """A hub id as it is; of a path, the last part."""
    return PurePath(model.name).name if PurePath(model.name).is_absolute() else model.name


def short_name(scenario: Scenario, *, cluster: Cluster, usual: Precision = Precision.BF16) -> str:
    """A scenario in a table: what tells it from its neighbours, the ``usual`` precision not being of that."""
    training = scenario.training
    parts = [_METHODS[training.method], strategy_text(scenario, cluster=cluster)]
    if training.precision not in (usual, Precision.BF16):
        parts.append(training.precision.value)
    if training.checkpointing is not Checkpointing.NONE:
        parts.append(f"{training.checkpointing} ckpt")
    if scenario.batch.micro_batch > 1:
        parts.append(f"micro-batch {scenario.batch.micro_batch}")
    return " · ".join(parts)


def method_text(training: Training) -> str:
    """``LoRA r=16 on all linear layers``."""
    if training.method is Method.FULL:
        frozen = training.freeze.replace(",", " and ")
        return f"full fine-tuning but for {frozen}" if frozen else "full fine-tuning"
    named = {"all-linear": "all linear layers", "attention": "the attention layers"}
    targets = named.get(training.lora_targets, training.lora_targets)
    adapter = " ".join(
        [_METHODS[training.method], *["DoRA"] * training.dora, *["rsLoRA"] * training.rslora, f"r={training.lora_rank}"]
    )
    saved = training.lora_modules_to_save.replace(",", " and ")
    return f"{adapter} on {targets}" + (f", with {saved}" if saved else "")


def strategy_text(scenario: Scenario, *, cluster: Cluster) -> str:
    """The strategy's name; one process on the CPU has no GPU to be single."""
    is_cpu = cluster.gpu.backend is Backend.CPU
    is_alone = scenario.strategy.num_ranks(cluster.num_gpus) == 1 and scenario.strategy.kind is StrategyKind.SINGLE
    return "single process" if is_cpu and is_alone else scenario.strategy.name


def batch_text(scenario: Scenario, *, cluster: Cluster) -> str:
    """``micro-batch 1 × 16 accumulation × 2 GPUs = 32 sequences of 4096``."""
    batch = scenario.batch
    num_ranks = scenario.strategy.num_data_ranks(cluster.num_gpus)
    what = "processes" if cluster.gpu.backend is Backend.CPU else "GPUs"
    shared = scenario.strategy.split.num_ranks
    factors = [f"micro-batch {batch.micro_batch}"]
    if batch.gradient_accumulation_steps > 1:
        factors.append(f"{batch.gradient_accumulation_steps} accumulation")
    if num_ranks > 1:
        factors.append(f"{num_ranks} groups of {shared} {what}" if shared > 1 else f"{num_ranks} {what}")
    if len(factors) == 1:
        return f"{factors[0]} of {batch.seq_len} tokens"
    return f"{' × '.join(factors)} = {batch.global_batch(num_ranks)} sequences of {batch.seq_len} tokens"


def memory_lines(candidate: Candidate, *, cluster: Cluster, canvas: Canvas) -> list[str]:
    """The peak with its range, the host, the disk and the speed."""
    estimate = candidate.estimate
    host = _host(cluster).removeprefix("the ")
    needs = " needs" if asks_rare_host(estimate, cluster) else ""
    parts = [peak_text(estimate, cluster=cluster), f"{host}{needs} {gib(estimate.host_peak_bytes)}"]
    if (greatest := max(_host_peaks(estimate))).num_bytes > estimate.host_peak_bytes:
        parts[-1] += f" ({gib(greatest.num_bytes)} while {greatest.doing})"
    parts.append(f"{gigabytes(_checkpoint_bytes(estimate))} per checkpoint{_write_text(estimate)}")
    if speed := speed_text(candidate):
        parts.append(speed)
    if candidate.data is not None and candidate.step.seconds > 0:
        parts.append(run_text(candidate.data))
    return canvas.flow(parts, first=INDENT, rest=INDENT, separator=" · ")


class _HostPeak(NamedTuple):
    num_bytes: int
    doing: str


def _host_peaks(estimate: Estimate) -> Iterator[_HostPeak]:
    """The host beside the step: loading, and saving where phases are known."""
    yield _HostPeak(estimate.host_load_peak_bytes, "loading")
    for peak in estimate.phases:
        if peak.phase is RunPhase.SAVE:
            yield _HostPeak(peak.host_peak_bytes, "saving")


def _write_text(estimate: Estimate) -> str:
    """``, ~28 min to write``, where training stands still for a minute or more."""
    seconds = estimate.checkpoint.write_seconds if estimate.checkpoint else 0.0
    return f", ~{duration(seconds)} to write" if seconds >= LONG_WRITE_SECONDS else ""


def _checkpoint_bytes(estimate: Estimate) -> int:
    """Everything that a checkpoint writes, where its parts are known."""
    return estimate.checkpoint.total_bytes if estimate.checkpoint else estimate.checkpoint_bytes


def peak_text(estimate: Estimate, *, cluster: Cluster) -> str:
    """``20.9 GiB of 23.5 usable per GPU (20.3–21.6)``."""
    scale = MemoryScale(largest_bytes=estimate.device_peak_bytes)
    low, high = scale.number(estimate.device_peak_low_bytes), scale.number(estimate.device_peak_high_bytes)
    place = "process" if cluster.gpu.backend is Backend.CPU else "GPU"
    usable = gib(estimate.device_usable_bytes)
    if scale.unit == "GiB":
        usable = usable.removesuffix(" GiB")
    spread = f" ({low}–{high})" if low != high else ""
    return f"{scale.number(estimate.device_peak_bytes)} {scale.unit} of {usable} usable per {place}{spread}"


def device_text(estimate: Estimate) -> str:
    """``20.9 GiB``; where the allocator was not run, the range that its cache leaves open, ``13.5–21.4 GiB``, of which
    the low end is enough, ``≥ 38.1 GiB``, where that is too much already."""
    low, high = estimate.device_peak_low_bytes, estimate.device_peak_high_bytes
    if estimate.is_simulated or low == high:
        return gib(estimate.device_peak_bytes)
    if low > estimate.device_usable_bytes:
        return f"≥ {gib(low)}"
    scale = MemoryScale(largest_bytes=high)
    return f"{scale.number(low)}–{scale.number(high)} {scale.unit}"


def speed_text(candidate: Candidate) -> str:
    """Step time and tokens per second, with ``~`` where nobody measured; empty where nothing is known."""
    step = candidate.step
    if step.seconds <= 0:
        return ""
    return f"{step_text(step)}, {_doubt(step)}{step.tokens_per_second_per_gpu:,.0f} tokens/s each"


def step_text(step: StepTime) -> str:
    """``~9.3 s per step``."""
    return f"{_doubt(step)}{duration(step.seconds)} per step"


def run_text(data: DataUse) -> str:
    """``~3.4 h (2.6–4.3 h) for one epoch``."""
    low, high = duration(data.seconds_low), duration(data.seconds_high)
    number, unit = low.split(" ")
    return f"~{duration(data.seconds)} ({number if high.endswith(f' {unit}') else low}–{high}) for one epoch"


def data_parts(data: DataUse | None) -> list[str]:
    """A data set and what one pass over it is made of."""
    if data is None:
        return []
    about = "about " if data.is_estimated else ""
    rows = "" if data.num_rows == data.num_examples else f" in {data.num_rows:,} sequences"
    return [
        f"{PurePath(data.path).name}: {data.num_examples:,} example{'s' * (data.num_examples != 1)}{rows}",
        f"{about}{data.mean_tokens:,.0f} tokens each, the longest {data.longest_tokens:,}",
        *([f"{data.num_truncated:,} cut"] if data.num_truncated else []),
        f"{data.num_steps:,} step{'s' * (data.num_steps != 1)} an epoch",
    ]


def bars(estimate: Estimate, *, canvas: Canvas) -> list[str]:
    """The memory at the peak by what it is for, flowing over as many lines as the width asks for."""
    scale = MemoryScale(largest_bytes=estimate.device_peak_bytes)
    sums = {label: sum(estimate.at_peak.get(key, 0) for key in keys) for label, keys in OWNERS.items()}
    shown = {label: value for label, value in sums.items() if value > SMALLEST_SHOWN * estimate.device_peak_bytes}
    largest = max(shown.values(), default=0)
    items = [
        f"{label} {scale.number(value)} {canvas.paint(bar(value, of=largest), Ink.BAR)}"
        for label, value in shown.items()
    ]
    return canvas.flow(items, first=INDENT, rest=INDENT)


def worst_moment(candidate: Candidate) -> str:
    """When the peak comes: in which part of a step, of which sequence, or in which other phase of the run."""
    estimate, data = candidate.estimate, candidate.data
    if other := _PHASES.get(estimate.worst_phase):
        return f"worst moment: {other}"
    is_longest = data is not None and data.num_rows == data.num_examples
    whose = f" of the longest sequence ({candidate.scenario.batch.seq_len:,} tokens)" if is_longest else ""
    return f"worst moment: {_STEP_PHASES[estimate.peak_phase]}{whose}"


def saved_text(saved_bytes: int) -> str:
    """``−3.2 GiB``."""
    scale = MemoryScale(largest_bytes=abs(saved_bytes))
    return f"{'−' if saved_bytes >= 0 else '+'}{scale.number(abs(saved_bytes))} {scale.unit}"


def time_text(factor: float) -> str:
    """``, +22% time``; nothing where the time is unknown."""
    percent = round(100 * (factor - 1))
    if factor <= 0:
        return ""
    return ", no slower" if percent == 0 else f", {'+' if percent > 0 else '−'}{abs(percent)}% time"


def phases(estimate: Estimate) -> list[str]:
    """Peaks on the device, and on the host of it, in the phases that are not the step that all other figures are of."""
    parts = [
        f"{name} {gib(peak.device_peak_bytes)} (host {gib(peak.host_peak_bytes)})"
        for peak in estimate.phases
        if (name := _PHASE_NAMES.get(peak.phase))
    ]
    return [f"device peak {parts[0]}", *parts[1:]] if parts else []


def host_uses(estimate: Estimate) -> list[str]:
    """What a node's memory is needed for, and what mapped weight files may take beside it."""
    moments = {RunPhase.LOAD: "loading", RunPhase.STEADY_STEP: "training", RunPhase.SAVE: "saving"}
    parts = []
    for peak in estimate.phases:
        if name := moments.get(peak.phase):
            mapped = peak.host_peak_bytes - peak.host_needed_bytes
            parts.append(
                f"{name} {gib(peak.host_needed_bytes)}" + (f" and {gib(mapped)} of mapped files" * (mapped > 0))
            )
    return parts


def disk_uses(estimate: Estimate) -> list[str]:
    """What a checkpoint is made of, and what a run holds of them."""
    files = estimate.checkpoint
    if files is None:
        return []
    parts = {
        "weights": files.weights_bytes,
        "the engine's own copy": files.engine_weights_bytes,
        "optimizer": files.optimizer_bytes,
        f"at most at once, with {files.num_kept} kept": files.disk_peak_bytes,
    }
    written = [f"~{duration(files.write_seconds)} to write one"] if files.write_seconds else []
    return [*(f"{name} {gigabytes(num_bytes)}" for name, num_bytes in parts.items() if num_bytes), *written]


_PHASE_NAMES = {
    RunPhase.LOAD: "loading",
    RunPhase.FIRST_STEP: "first step",
    RunPhase.EVALUATION: "evaluation",
    RunPhase.SAVE: "saving",
}
_STEP_PHASES = {
    "forward": "the forward",
    "loss": "the loss",
    "backward": "the backward",
    "optimizer": "the optimizer step",
}
_PHASES = {
    RunPhase.LOAD: "loading the model",
    RunPhase.FIRST_STEP: "the first step",
    RunPhase.SAVE: "saving a checkpoint",
}
_METHODS = {Method.FULL: "full", Method.LORA: "LoRA", Method.QLORA: "QLoRA"}


def _doubt(step: StepTime) -> str:
    return "" if step.validated else "~"
