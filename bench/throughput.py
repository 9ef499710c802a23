"""Predicted beside published tokens per second, by family of runs.

    python bench/throughput.py [MEASUREMENTS.jsonl] [--rows]

Each line of the file is one published run: model, GPU, strategy, precision, batch and ``tokens_per_s_per_gpu``; it
defaults to ``$LAUNCHKIT_GROUND_TRUTH/measurements.jsonl``. Runs come in families (one source, GPU, strategy and
method), which share their code's strengths; what counts is each family's median ratio, and its spread. Runs with
kernels of their own (fused triton, Liger), quantised weights or settings that launchkit does not model are left out and
counted.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import launchkit
from launchkit.errors import LaunchkitError

MODELS = {"TinyLlama/TinyLlama-1.1B": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"}  # where a name is not the catalogue's
GPUS = {"A100-SXM4-40GB": "A100-40GB", "H100-80GB HBM3": "H100", "H100-80GB": "H100", "A800-80GB": "A100-80GB"}
STRATEGIES = {"single": "single", "ddp": "ddp", "fsdp_full_shard": "fsdp", "zero2": "zero2", "zero3": "zero3"}
PRECISIONS = {
    "fp32": "fp32",
    "fp16_amp": "fp16",
    "bf16_amp": "bf16",
    "bf16_pure": "bf16-pure",
    "bf16_params_autocast": "bf16-params",
    "fsdp_bf16_mp_fp32_master": "bf16",
}
CHECKPOINTING = {"none": "none", "full": "full"}
OWN_KERNELS = ("foak", "liger", "fused triton")


class Unmodelled(Exception):
    """A run that launchkit does not claim to describe; the text says which of its settings."""


def flags_of(run: dict[str, Any]) -> dict[str, Any]:
    """The flags of ``launchkit estimate`` for a published run."""
    if run["quant"] or run["offload"] not in (None, "none"):
        raise Unmodelled("quantised or offloaded")
    if any(kernel in f"{run['loss_impl']} {run['raw']}" for kernel in OWN_KERNELS):
        raise Unmodelled("kernels of its own")
    flags: dict[str, Any] = {
        "gpus": f"{run['n_gpus']}x{GPUS.get(run['gpu'], run['gpu'])}",
        "strategy": _known(STRATEGIES, run, "strategy_class"),
        "precision": _known(PRECISIONS, run, "precision"),
        "checkpointing": _known(CHECKPOINTING, run, "checkpointing"),
        "optimizer": "adamw_torch",
        "method": run["method"],
        "micro_batch": run["micro_batch"] or 1,
        "seq_len": run["seq_len"] or 0,
        "global_batch": (run["micro_batch"] or 1) * run["n_gpus"] * (run["grad_accum"] or 1),
    }
    if not flags["seq_len"]:
        raise Unmodelled("no fixed length")
    if run["lora"]:
        flags |= {"lora_rank": run["lora"]["r"]}
        if run["lora"].get("targets"):
            flags |= {"lora_targets": ",".join(run["lora"]["targets"])}
    return flags


def _known(table: dict[str, str], run: dict[str, Any], field: str) -> str:
    if run[field] not in table:
        raise Unmodelled(f"{field} {run[field]}")
    return table[run[field]]


def family_of(run: dict[str, Any]) -> str:
    return f"{run['source_group']}, {run['gpu']}, {run['strategy_class']}, {run['method']}"


def main() -> int:
    """Print the median ratio and the spread of each family, every run with ``--rows``, and what was left out."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    default = Path(os.environ.get("LAUNCHKIT_GROUND_TRUTH", "ground_truth")) / "measurements.jsonl"
    path = Path(arguments[0]) if arguments else default
    if not path.exists():
        print(f"no measurements at {path}; give their file")
        return 2
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for run in map(json.loads, path.read_text().splitlines()):
        measured = run["tokens_per_s_per_gpu"]
        if not measured:
            continue
        try:
            flags = flags_of(run)
            step = launchkit.estimate(MODELS.get(run["model"], run["model"]), **flags).step
        except (Unmodelled, LaunchkitError) as error:
            left_out[str(error)] += 1
            continue
        ratio = step.tokens_per_second_per_gpu / measured
        ratios[family_of(run)].append(ratio)
        if "--rows" in sys.argv:
            print(f"{ratio:6.3f}  {step.tokens_per_second_per_gpu:8.0f} of {measured:8.0f}  {run['id']}")
    for family, values in sorted(ratios.items()):
        print(
            f"{statistics.median(values):6.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} runs)  {family}"
        )
    for reason, count in left_out.most_common():
        print(f"left out {count:4}: {reason}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
