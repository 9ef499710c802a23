"""Resident memory of real loads beside the prediction: ``python -m bench.host [--only NAME]``.

A model of random weights is saved, then loaded in fresh processes as each engine loads it, on the CPU. A node's
resident memory counts each page once: the private pages of all its processes, and the mapped pages (weight files,
libraries) of the process that has most of them. The prediction is for ranks that keep in step; of two runs the higher
counts, since on few cores they seldom do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import launchkit
from bench.accuracy.measure import environment, free_port
from launchkit.plan import RunPhase
from launchkit.units import MIB

FIELDS = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
REPEATS = 2
# strategy, processes, dtype of the files, dtype loaded, accelerate's mixed precision, the flag that says the same
CASES: tuple[tuple[str, int, str, str, str, str], ...] = (
    ("single", 1, "bfloat16", "float32", "no", "fp32"),
    ("single", 1, "float32", "bfloat16", "no", "bf16-pure"),
    ("single", 1, "bfloat16", "bfloat16", "no", "bf16-pure"),
    ("ddp", 2, "bfloat16", "bfloat16", "no", "bf16-pure"),
    ("ddp", 2, "bfloat16", "float32", "no", "fp32"),
    ("fsdp2", 2, "bfloat16", "bfloat16", "no", "bf16-pure"),
    ("fsdp2", 2, "bfloat16", "float32", "bf16", "bf16"),
    ("fsdp2", 2, "float32", "float32", "no", "fp32"),
    ("zero2", 2, "bfloat16", "bfloat16", "bf16", "bf16"),
    ("zero3", 2, "bfloat16", "bfloat16", "bf16", "bf16"),
)


def save_model(dtype: str, folder: Path) -> None:
    """A Llama of 317M parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**FIELDS)).to(getattr(torch, dtype)).save_pretrained(folder)


def measured_bytes(case: dict[str, Any], num_processes: int) -> int:
    """The node's resident peak in one run of ``case``."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        port = free_port()
        ranks = [
            context.Process(target=_rank, args=(case, Path(name), environment(rank, num_processes, port), rank))
            for rank in range(num_processes)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        return node_peak([json.loads((Path(name) / f"rank{i}.json").read_text()) for i in range(num_processes)])


def _rank(case: dict[str, Any], folder: Path, variables: dict[str, str], rank: int) -> None:
    os.environ |= variables
    from bench import host_worker  # imports torch, which only the ranks need

    host_worker.run(case, folder, rank)


def node_peak(ranks: Sequence[Sequence[Sequence[float]]]) -> int:
    """The highest sum over processes of private bytes, and of the most mapped ones, at any moment."""
    times = [[sample[0] for sample in samples] for samples in ranks]
    peak = 0.0
    for moment in sorted(time for own in times for time in own):
        places = [bisect_right(own, moment) - 1 for own in times]
        now = [samples[place] for samples, place in zip(ranks, places, strict=True) if place >= 0]
        peak = max(peak, sum(sample[1] for sample in now) + max(sample[2] for sample in now))
    return round(peak)


def predicted_bytes(model: Path, *, strategy: str, num_processes: int, precision: str) -> int:
    """What the plan of the same run says of loading."""
    candidate = launchkit.estimate(
        str(model), gpus=f"{num_processes}xcpu", strategy=strategy, precision=precision, seq_len=64
    )
    return next(peak.host_peak_bytes for peak in candidate.estimate.phases if peak.phase is RunPhase.LOAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as name:
        for dtype in ("bfloat16", "float32"):
            process = multiprocessing.get_context("spawn").Process(target=save_model, args=(dtype, Path(name) / dtype))
            process.start()
            process.join()
        for strategy, num_processes, stored, loaded, mixed, precision in CASES:
            title = f"{strategy} {stored} as {loaded}, mixed {mixed}"
            if only not in title:
                continue
            model = Path(name) / stored
            case = {"strategy": strategy, "model": str(model), "dtype": loaded, "mixed": mixed}
            measured = max(measured_bytes(case, num_processes) for _ in range(REPEATS))
            predicted = predicted_bytes(model, strategy=strategy, num_processes=num_processes, precision=precision)
            error = predicted / measured - 1
            print(
                f"{title:42} {measured / MIB:7.0f} MiB measured {predicted / MIB:7.0f} predicted {error:+7.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
