"""Published GPU runs beside what ``launchkit estimate`` says of them: ``published.json`` here.

``python -m bench.accuracy.published FOLDER`` reads ``measurements.jsonl`` (runs with a measured peak) and
``outcomes.jsonl`` (runs of which only the outcome is known) in FOLDER. A row is predicted when its configuration can
be said in launchkit's flags; one that cannot is counted with the reason. Where the source of what a run executed is
known, the step is traced with that code's habits (``past``). Rows of another implementation of the model are compared
too, but apart: there the kernels of the step differ, not only its sharding. Then ask the other tools again:
``python -m bench.accuracy.rivals``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest import mock

from bench.accuracy import page
from bench.accuracy.past import Past, PastBench, PastModel
from bench.accuracy.rows import DEVICE_SUFFIX, PUBLISHED, Row, error_percent, read_json
from launchkit import planner, strategies
from launchkit.api import find_cluster
from launchkit.catalog.models import TracedModel, find_model
from launchkit.errors import HubError, IllegalScenarioError, LaunchkitError, UnknownModelError
from launchkit.plan import Candidate
from launchkit.planner import evaluate
from launchkit.planner.evaluate import judge
from launchkit.request import Request, resolve
from launchkit.scenario import Scenario
from launchkit.units import GIB

MODELS = {
    "TinyLlama/TinyLlama-1.1B": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "huggyllama/llama-7b": "meta-llama/Llama-2-7b-hf",
    "mistralai/Mistral-7B-v0.2": "mistralai/Mistral-7B-v0.3",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "bert-large-uncased": "google-bert/bert-large-uncased",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-medium": "openai-community/gpt2-medium",
}
GPUS = {
    "A100-SXM4-40GB": "A100-40GB",
    "H100-80GB HBM3": "H100",
    "H100-80GB": "H100",
    "A800-80GB": "A800",
    "A10G-24GB": "A10G",
}
PRECISIONS = {
    "fp32": "fp32",
    "fp16_amp": "fp16",
    "bf16_pure": "bf16-pure",
    "bf16_params_autocast": "bf16-params",
    "fsdp_bf16_mp_fp32_master": "bf16",
    "zero_bf16": "bf16",
    "zero_fp16": "fp16",
    "zero_bf16/fp16 (16-bit + fp32 master; exact dtype not in the excerpt)": "bf16",
}
LOSSES = {
    "HF eager (logits upcast to fp32)": "plain",
    "HF eager (fp32 logits)": "plain",
    "HF (fp32 logits) assumed": "plain",
    "classification loss (2 labels)": "plain",
    "CE full logits": "plain",
    "CE": "plain",
    "chunked_cross_entropy chunk_size=0 (full logits)": "plain",
    "fused triton cross-entropy (foak)": "plain",  # of which ``past`` knows the kernel
    "liger fused linear cross-entropy": "liger",
}
OPTIMIZERS = {
    "adamw_torch (foreach)": "adamw_torch",
    'adamw_torch (optimizer="AdamW" defaults)': "adamw_torch",
    "adamw_torch": "adamw_torch",
    "adamw_torch/hf": "adamw_torch",
    "adamw": "adamw_torch",
    "adam (DeepSpeed FusedAdam, inferred)": "adamw_torch_fused",
    "adam (DeepSpeedCPUAdam)": "adamw_torch_fused",
    "adafactor": "adafactor",
    "bnb Adam8bit": "adamw_bnb_8bit",
}
STRATEGIES = {
    "single": "single",
    "ddp": "ddp",
    "fsdp_full_shard": "fsdp",
    "fsdp2_full_shard": "fsdp2",
    "zero2": "zero2",
    "zero3": "zero3",
}
OFFLOADS = {"none": "none", None: "none", "optimizer cpu": "optimizer", "params+optimizer cpu": "all"}
CHECKPOINTINGS = {"full": "full", "none": "none", None: "none"}
ATTENTIONS = {
    "flash_attention_2": "flash_attention_2",
    "sdpa (flash kernel)": "sdpa",
    "sdpa (flash)": "sdpa",
    "sdpa": "sdpa",
    "eager": "eager",
    "not in excerpt (memory fits flash/sdpa)": "sdpa",
}
# Metric of the row, and the field of an estimate that means the same.
METRICS = {
    "allocated": "allocated_peak_bytes",
    "active": "allocated_peak_bytes",
    "reserved": "reserved_peak_bytes",
    "device": "device_peak_bytes",
}
# What chenyaofo's training code, of which the gist tells, gives DeepSpeed: chenyaofo/OpenLM ``config/default.hocon``.
OPENLM_SETTINGS = (
    "overlap_comm=true,stage3_param_persistence_threshold=10000,stage3_max_live_parameters=30000000,"
    "stage3_prefetch_bucket_size=30000000,memory_efficient_linear=false"
)
# Rows that do not say what their figures say.
CONTRADICTORY = {
    "gist-zero-01": "measured: before the first optimizer step (no room for its states in 19.4 GiB)",
    "gist-zero-02": "measured: before the first optimizer step (no room for its states in 19.4 GiB)",
    "gist-zero-08": "not stated: micro-batch (4 is printed, with the logits and activations of 2)",
    "gist-zero-11": "not stated: micro-batch (8 is printed, with the logits and activations of 16)",
}
NVIDIA_SMI = "nvidia-smi (1s sampling, mean of GPU peaks, minus idle)"  # the device's figure among a row's other ones
# Sources whose runs execute transformers' models, by the code they ran; the others bring models of their own. Torch 1
# set gradients to zero between steps instead of freeing them and loaded all kernels with the context (1.3 GiB).
GROUPS = {"fms-acceleration": "transformers", "ZeRO gist": "transformers", "HF transformers docs": "torch 1"}


class NotComparable(Exception):
    """Why a row's configuration cannot be said in launchkit's flags, as ``kind: value``."""


def said(table: Mapping[Any, str], value: Any, *, what: str) -> str:
    """The flag's value for a row's field."""
    if value not in table:
        raise NotComparable(f"{what}: {value}")
    return table[value]


def flags_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's configuration as the flags of ``launchkit estimate``. Raises ``NotComparable``."""
    if row["id"] in CONTRADICTORY:
        raise NotComparable(CONTRADICTORY[row["id"]])
    quantised = row["quant"] is not None
    if quantised and row["quant"] != "nf4":
        raise NotComparable(f"weights: {row['quant']}")
    if quantised:
        check_quantised(row)
    if row["compile"] not in (False, None):
        raise NotComparable(f"compiled: by {row['compile']}")
    if not row["micro_batch"] or not row["seq_len"]:
        raise NotComparable("not stated: micro-batch or length")
    precision = "bf16-params" if quantised else said(PRECISIONS, row["precision"], what="precision")
    loss = "plain" if row["loss_impl"] is None else said(LOSSES, row["loss_impl"], what="loss")
    num_gpus = row["n_gpus"]
    flags = {
        "gpus": f"{num_gpus}x{GPUS.get(row['gpu'], row['gpu']).replace(' ', '-')}",
        "strategy": said(STRATEGIES, row["strategy"], what="strategy"),
        "offload": said(OFFLOADS, row["offload"], what="offload"),
        "method": row["method"],
        "precision": precision,
        "optimizer": said(OPTIMIZERS, row["optimizer"], what="optimizer"),
        "micro_batch": row["micro_batch"],
        "global_batch": row["micro_batch"] * (row["grad_accum"] or 1) * num_gpus,
        "seq_len": row["seq_len"],
        "checkpointing": said(CHECKPOINTINGS, row["checkpointing"], what="checkpointing"),
        "attention": said(ATTENTIONS, row["attn"], what="attention"),
        "loss": loss,
        "trainer": trainer_of(row, loss),
    }
    if flags["trainer"] == "axolotl":  # which tells the allocator what these runs did not, and pads
        flags |= {"alloc_conf": "expandable_segments:False", "padding": False}
    if row["source_group"] == "ZeRO gist":
        flags["zero_settings"] = OPENLM_SETTINGS
    if row["method"] not in ("full", "lora", "qlora"):
        raise NotComparable(f"method: {row['method']}")
    return flags | (lora_flags(row["lora"]) if row["method"] != "full" else {})


def trainer_of(row: Mapping[str, Any], loss: str) -> str:
    """Whose step the row's run is. fms-acceleration takes Liger's loss without its layer kernels, as ``--trainer
    axolotl`` does."""
    if row["source_group"] == "litgpt":
        return "loop"
    return "axolotl" if loss == "liger" and row["source_group"] == "fms-acceleration" else "hf"


def check_quantised(row: Mapping[str, Any]) -> None:
    """Raises ``NotComparable`` where a 4-bit run held other weights than the same flags mean today: in transformers 4
    the experts of Mixtral were linear layers, which bitsandbytes quantises."""
    if "Mixtral" in row["model"]:
        raise NotComparable("4-bit: experts that transformers 5 leaves in 16 bits")


def past_of(row: Mapping[str, Any]) -> Past:
    """The habits of the code that a row's run executed, where its source is known."""
    if row["source_group"] == "ZeRO gist":
        return Past(reenters=True, shifts_logits=True, widens_logits=True, keeps_outputs=True)
    if row["source_group"] != "fms-acceleration":
        return Past()
    (configuration,) = re.findall(r"framework_config=([\w-]+)", row["raw"])
    has_logits = row["loss_impl"] != "liger fused linear cross-entropy"
    is_fast = "foak" in configuration
    is_early = "transformers 4.45" in row["framework"]
    return Past(
        reenters=True,
        shifts_logits=has_logits,
        widens_logits=has_logits and is_early,
        fused_loss=has_logits and is_fast,
        repeats_keys=is_early and "Mistral" in row["model"],
        fast_kernels=is_fast,
        checkpoints_units=row["strategy"] == "fsdp_full_shard",
        keeps_half=configuration.startswith("accelerated-peft-bnb"),
        brings_units="bnb" in configuration and row["strategy"] == "fsdp_full_shard",
        widens_norms_alone=configuration == "baseline-peft-bnb" and row["strategy"] == "single",
    )


def lora_flags(lora: Mapping[str, Any] | None) -> dict[str, Any]:
    """Rank, targets and dropout of a row's adapters."""
    if not lora or not isinstance(lora.get("targets"), list):
        raise NotComparable("not stated: adapters")
    targets = ",".join(lora["targets"])
    return {"lora_rank": lora["r"], "lora_targets": targets, "lora_dropout": lora.get("dropout", 0.0)}


def compare(row: Mapping[str, Any]) -> tuple[Row, ...]:
    """One row with its prediction, or with the reason why there is none; and what the driver showed of the same run."""
    metric = row["metric_class"]
    compared = Row(
        id=row["id"],
        source=row["source"],
        group=GROUPS.get(row["source_group"], row["source_group"]),
        bench="".join(name for name in row["bench"] if len(name) == 1),
        confidence=row["confidence"],
        metric=metric,
        measured_bytes=round((row["peak_gib"] or 0) * GIB),
        ran_out="OOM" in row["measured_kind"],
    )
    past = past_of(row)
    try:
        if metric not in METRICS and metric != "outcome":
            raise NotComparable(f"metric: {metric}")
        flags = flags_of(row)
        candidate = predict(MODELS.get(row["model"], row["model"]), flags, past)
    except NotComparable as reason:
        return (replace(compared, skipped=str(reason)),)
    except (UnknownModelError, HubError):
        return (replace(compared, skipped=f"model: {row['model']}, not in the catalogue"),)
    except LaunchkitError as error:
        fact = str(error).partition(";")[0]
        return (replace(compared, skipped=f"refused: {fact}"),)
    compared = replace(compared, flags={"model": candidate.model.name, **flags}, habits=past.habits)
    told = replace(compared, **figures(candidate, metric))
    device_gib = (row["alt_peaks_gib"] or {}).get(NVIDIA_SMI)
    if not device_gib or metric == "outcome":
        return (told,)
    shown = replace(compared, id=f"{told.id}{DEVICE_SUFFIX}", metric="device", measured_bytes=round(device_gib * GIB))
    return told, replace(shown, **figures(candidate, "device"))


def predict(model: str, flags: Mapping[str, Any], past: Past) -> Candidate:
    """What ``launchkit estimate`` says, of a step with the habits of ``past``. No run is Axolotl's own."""
    with mock.patch.object(evaluate, "as_axolotl", lambda key, *_: key):
        return _predicted(model, flags, past)


def _predicted(model: str, flags: Mapping[str, Any], past: Past) -> Candidate:
    request = Request.from_flags(flags)
    cluster = find_cluster(request.gpus)
    source = find_model(model)
    scenario = resolve(request, model=source.profile, cluster=cluster).scenario
    if past == Past():
        return planner.estimate(source, cluster=cluster, scenario=scenario)
    reason = strategies.refusal(scenario, source.profile, cluster)
    if reason is not None:
        raise IllegalScenarioError(reason)
    bench = PastBench(source=past_model(model, past), cluster=cluster, past=past)
    return judge(bench, as_it_ran(scenario, past))


def as_it_ran(scenario: Scenario, past: Past) -> Scenario:
    """``scenario`` without the prefetch that units inside checkpointed calls do not have."""
    strategy = scenario.strategy
    fsdp = replace(strategy.fsdp, backward_prefetch=strategy.fsdp.backward_prefetch and not past.checkpoints_units)
    return replace(scenario, strategy=replace(strategy, fsdp=fsdp))


@cache
def past_model(model: str, past: Past) -> PastModel:
    """One for each model and habits, since tracing takes seconds."""
    return PastModel(source=cast(TracedModel, find_model(model)), past=past)


def figures(candidate: Candidate, metric: str) -> dict[str, Any]:
    """The predicted value of a metric with its range, which is the device's, moved to the metric's level."""
    found = candidate.estimate
    predicted = getattr(found, METRICS.get(metric, "device_peak_bytes"))
    return {
        "predicted_bytes": predicted,
        "low_bytes": predicted * found.device_peak_low_bytes // found.device_peak_bytes,
        "high_bytes": predicted * found.device_peak_high_bytes // found.device_peak_bytes,
        "fits": found.fits,
        "may_fit": found.device_peak_low_bytes <= found.device_usable_bytes,
    }


def read(path: Path) -> Iterator[dict[str, Any]]:
    yield from (json.loads(line) for line in path.read_text().splitlines() if line.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, help="where measurements.jsonl and outcomes.jsonl are")
    parser.add_argument("--only", default="", help="rows whose id contains this")
    arguments = parser.parse_args()
    old = {row["id"]: row for row in read_json(PUBLISHED)}
    for name in ("measurements.jsonl", "outcomes.jsonl"):
        for row in read(arguments.folder / name):
            if arguments.only in row["id"]:
                for compared in compare(row):
                    old[compared.id] = asdict(compared)
                    print(text(compared), flush=True)
                PUBLISHED.write_text(json.dumps(sorted(old.values(), key=lambda r: r["id"]), indent=1) + "\n")
    page.write()


def text(row: Row) -> str:
    """One line for the terminal."""
    if row.skipped:
        return f"{row.id}  –  {row.skipped}"
    if not row.measured_bytes:
        return f"{row.id}  {'ran out' if row.ran_out else 'ran'}  predicted: {row.verdict}"
    error = error_percent(row.predicted_bytes, row.measured_bytes, row.measured_bytes)
    return f"{row.id}  {row.measured_bytes / GIB:.2f}  {row.predicted_bytes / GIB:.2f}  {error:+.1f} %"


if __name__ == "__main__":
    main()
