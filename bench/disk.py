"""Bytes of real checkpoints beside the prediction: ``python -m bench.disk [--only NAME]``.

transformers' Trainer takes two steps and saves, in one process or two over gloo, under each engine and method.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.accuracy.measure import environment, free_port
from bench.disk_worker import SEQ_LEN, VOCABULARY
from launchkit import api
from launchkit.plan import CheckpointFiles
from launchkit.planner.disk import checkpoint_files
from launchkit.planner.evaluate import Bench, run_of
from launchkit.request import Request, resolve
from launchkit.scenario import Strategy
from launchkit.units import MIB

FIELDS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TIMEOUT_SECONDS = 120.0


class Case(NamedTuple):
    """``gathers`` where whole weights are gathered to be saved, ``model_only`` where nothing is saved to resume from
    (``save_only_model``)."""

    strategy: str
    method: str
    num_processes: int
    gathers: bool = True
    model_only: bool = False

    @property
    def title(self) -> str:
        shards, alone = "" if self.gathers else " shards only", " model only" if self.model_only else ""
        return f"{self.strategy} {self.method}{shards}{alone}"


CASES = (
    Case("single", "full", 1),
    Case("single", "lora", 1),
    Case("single", "qlora", 1),
    Case("single", "full", 1, model_only=True),
    Case("ddp", "full", 2),
    Case("ddp", "lora", 2),
    Case("ddp", "qlora", 2),
    Case("fsdp2", "full", 2),
    Case("fsdp2", "lora", 2),
    Case("fsdp2", "full", 2, gathers=False),
    Case("fsdp2", "lora", 2, gathers=False),
    Case("fsdp2", "full", 2, model_only=True),
    Case("zero1", "full", 2),
    Case("zero1", "lora", 2),
    Case("zero2", "full", 2),
    Case("zero2", "lora", 2),
    Case("zero2", "full", 2, model_only=True),
    Case("zero3", "full", 2),
    Case("zero3", "lora", 2),
    Case("zero3", "full", 2, gathers=False),
    Case("zero3", "lora", 2, gathers=False),
    Case("zero3", "full", 2, model_only=True),
)


def save_model(folder: Path) -> None:
    """A Llama of 27M parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**FIELDS)).save_pretrained(folder)


class Measured(NamedTuple):
    """Bytes of one checkpoint's files, and how far the node's private memory rose while they were written."""

    files_bytes: int
    host_bytes: int


def measured(case: dict[str, Any], num_processes: int) -> Measured:
    """What one checkpoint holds, and took."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        port = free_port()
        variables = [environment(rank, num_processes, port) for rank in range(num_processes)]
        ranks = [context.Process(target=_rank, args=(case, Path(name), own)) for own in variables]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
            rank.kill()  # gloo now and then waits for ever; what was written then is not a whole checkpoint
        files = (Path(name) / "checkpoint-2").rglob("*")
        rises = [int(path.read_text()) for path in Path(name).glob("rise-*")]
        return Measured(sum(path.stat().st_size for path in files if path.is_file()), sum(rises))


def _rank(case: dict[str, Any], folder: Path, variables: dict[str, str]) -> None:
    os.environ |= variables
    from bench import disk_worker  # imports torch, which only the ranks need

    disk_worker.run(case, folder)


class Predicted(NamedTuple):
    files: CheckpointFiles
    host_bytes: int


def predicted(model: Path, case: Case) -> Predicted:
    """What a plan of the same run says."""
    strategy, num_processes = case.strategy, case.num_processes
    request = Request.from_flags(
        {
            "gpus": f"{num_processes}xcpu",
            "strategy": strategy,
            "method": case.method,
            "precision": "bf16" if strategy.startswith("zero") or case.method == "qlora" else "fp32",
            "optimizer": "adamw_torch",
            "seq_len": SEQ_LEN,
        }
    )
    cluster, source = api.find_cluster(request.gpus), api.find_source(str(model), request)
    scenario = resolve(request, model=source.profile, cluster=cluster).scenario
    scenario = replace(scenario, strategy=_saving(scenario.strategy, gathers=case.gathers))
    bench = Bench(source=source, cluster=cluster)
    run = run_of(bench, scenario)
    files = checkpoint_files(run.sizes, scenario, num_ranks=num_processes)
    return Predicted(files, run.host_saving().needed_bytes - run.host_training(0).needed_bytes)


def _saving(strategy: Strategy, *, gathers: bool) -> Strategy:
    fsdp = replace(strategy.fsdp, full_state_dict=gathers)
    return replace(strategy, fsdp=fsdp, zero=replace(strategy.zero, gather_16bit_weights_on_model_save=gathers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as name:
        process = multiprocessing.get_context("spawn").Process(target=save_model, args=(Path(name),))
        process.start()
        process.join()
        for case in CASES:
            if only not in case.title:
                continue
            found = measured({**case._asdict(), "model": name}, case.num_processes)
            told = predicted(Path(name), case)
            total = told.files.weights_bytes if case.model_only else told.files.total_bytes
            error = total / found.files_bytes - 1 if found.files_bytes else 0.0
            print(
                f"{case.title:24} {found.files_bytes:13,} bytes measured {total:13,} predicted {error:+7.2%}; "
                f"host rises {found.host_bytes / MIB:5.0f} MiB, {told.host_bytes / MIB:5.0f} predicted",
                flush=True,
            )


if __name__ == "__main__":
    main()
