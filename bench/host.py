"""Resident memory of real loads and runs beside the prediction: ``python -m bench.host [--only NAME] [--size 60M]``.

A model of random weights is saved, then loaded in fresh processes as each engine loads it, on the CPU, and trained for
a few steps where the case says so. A node's
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
from typing import Any, NamedTuple

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
SEQ_LEN = 256  # of the two sequences of a step that is trained


class Case(NamedTuple):
    """``stored`` and ``loaded`` are torch's names of dtypes, ``mixed`` is accelerate's, ``precision`` the flag that
    says the same."""

    strategy: str
    num_processes: int
    stored: str
    loaded: str
    mixed: str
    precision: str
    offload: str = "none"
    num_steps: int = 0  # 0: the model is only loaded

    @property
    def title(self) -> str:
        trained = f", {self.num_steps} steps" if self.num_steps else ""
        offload = f", {self.offload} offloaded" if self.offload != "none" else ""
        return f"{self.strategy} {self.stored} as {self.loaded}, mixed {self.mixed}{offload}{trained}"


CASES = (
    Case("single", 1, "bfloat16", "float32", "no", "fp32"),
    Case("single", 1, "float32", "bfloat16", "no", "bf16-pure"),
    Case("single", 1, "bfloat16", "bfloat16", "no", "bf16-pure"),
    Case("ddp", 2, "bfloat16", "bfloat16", "no", "bf16-pure"),
    Case("ddp", 2, "bfloat16", "float32", "no", "fp32"),
    Case("fsdp2", 2, "bfloat16", "bfloat16", "no", "bf16-pure"),
    Case("fsdp2", 2, "bfloat16", "float32", "bf16", "bf16"),
    Case("fsdp2", 2, "float32", "float32", "no", "fp32"),
    Case("zero2", 2, "bfloat16", "bfloat16", "bf16", "bf16"),
    Case("zero3", 2, "bfloat16", "bfloat16", "bf16", "bf16"),
    Case("single", 1, "float32", "float32", "no", "fp32", num_steps=3),
    Case("ddp", 2, "bfloat16", "bfloat16", "no", "bf16-pure", num_steps=3),
    Case("fsdp2", 2, "bfloat16", "float32", "bf16", "bf16", num_steps=3),
    Case("zero2", 2, "bfloat16", "bfloat16", "bf16", "bf16", num_steps=3),
    Case("zero2", 2, "bfloat16", "bfloat16", "bf16", "bf16", offload="optimizer", num_steps=3),
    Case("zero3", 2, "bfloat16", "bfloat16", "bf16", "bf16", num_steps=3),
    Case("zero3", 2, "bfloat16", "bfloat16", "bf16", "bf16", offload="all", num_steps=3),
)


# 317M parameters, and others by the name that ``--size`` takes.
SIZES = {
    "60M": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8},
    "317M": {},
    "400M": {"num_hidden_layers": 21},
}


def save_model(dtype: str, size: str, folder: Path) -> None:
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**FIELDS | SIZES[size])).to(getattr(torch, dtype)).save_pretrained(folder)


def measured_bytes(case: Case, model: Path) -> int:
    """The node's resident peak in one run of ``case``."""
    num_processes = case.num_processes
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        port = free_port()
        told = {**case._asdict(), "model": str(model)}
        ranks = [
            context.Process(target=_rank, args=(told, Path(name), environment(rank, num_processes, port), rank))
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


def predicted_bytes(case: Case, model: Path) -> int:
    """What the plan of the same run says of loading, and of a steady step where it trains, whichever is more: what
    loading took of the heap stays with the process."""
    candidate = launchkit.estimate(
        str(model),
        gpus=f"{case.num_processes}xcpu",
        strategy=case.strategy,
        precision=case.precision,
        offload=case.offload,
        trainer="loop",
        micro_batch=2,
        seq_len=SEQ_LEN,
    )
    phases = (RunPhase.LOAD, RunPhase.STEADY_STEP) if case.num_steps else (RunPhase.LOAD,)
    return max(peak.host_peak_bytes for peak in candidate.estimate.phases if peak.phase in phases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--size", choices=SIZES, default="317M", help="parameters of the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for dtype in ("bfloat16", "float32"):
            process = multiprocessing.get_context("spawn").Process(
                target=save_model, args=(dtype, arguments.size, Path(name) / dtype)
            )
            process.start()
            process.join()
        for case in CASES:
            if arguments.only not in case.title:
                continue
            model = Path(name) / case.stored
            measured = max(measured_bytes(case, model) for _ in range(REPEATS))
            predicted = predicted_bytes(case, model)
            error = predicted / measured - 1
            print(
                f"{case.title:62} {measured / MIB:7.0f} MiB measured {predicted / MIB:7.0f} predicted {error:+7.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
