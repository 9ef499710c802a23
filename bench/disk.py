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
from typing import Any

from bench.accuracy.measure import environment, free_port
from bench.disk_worker import SEQ_LEN, VOCABULARY
from launchkit import api
from launchkit.plan import CheckpointFiles
from launchkit.planner.disk import checkpoint_files
from launchkit.planner.evaluate import Bench
from launchkit.request import Request, resolve
from launchkit.scenario import Strategy

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
# strategy, method, processes, whether whole weights are gathered to be saved
CASES: tuple[tuple[str, str, int, bool], ...] = (
    ("single", "full", 1, True),
    ("single", "lora", 1, True),
    ("ddp", "lora", 2, True),
    ("fsdp2", "full", 2, True),
    ("fsdp2", "lora", 2, True),
    ("fsdp2", "full", 2, False),
    ("zero1", "full", 2, True),
    ("zero2", "full", 2, True),
    ("zero2", "lora", 2, True),
    ("zero3", "full", 2, True),
    ("zero3", "lora", 2, True),
    ("zero3", "full", 2, False),
)


def save_model(folder: Path) -> None:
    """A Llama of 27M parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**FIELDS)).save_pretrained(folder)


def measured_bytes(case: dict[str, Any], num_processes: int) -> int:
    """All that one checkpoint holds."""
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
        return sum(path.stat().st_size for path in files if path.is_file())


def _rank(case: dict[str, Any], folder: Path, variables: dict[str, str]) -> None:
    os.environ |= variables
    from bench import disk_worker  # imports torch, which only the ranks need

    disk_worker.run(case, folder)


def predicted(model: Path, *, strategy: str, method: str, num_processes: int, gathers: bool) -> CheckpointFiles:
    """What a plan of the same run says."""
    request = Request.from_flags(
        {
            "gpus": f"{num_processes}xcpu",
            "strategy": strategy,
            "method": method,
            "precision": "bf16" if strategy.startswith("zero") else "fp32",
            "optimizer": "adamw_torch",
            "seq_len": SEQ_LEN,
        }
    )
    cluster, source = api.find_cluster(request.gpus), api.find_source(str(model), request)
    scenario = resolve(request, model=source.profile, cluster=cluster).scenario
    scenario = replace(scenario, strategy=_saving(scenario.strategy, gathers=gathers))
    return checkpoint_files(Bench(source=source, cluster=cluster).sizes(scenario), scenario, num_ranks=num_processes)


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
        for strategy, method, num_processes, gathers in CASES:
            title = f"{strategy} {method}{'' if gathers else ' shards only'}"
            if only not in title:
                continue
            measured = measured_bytes(
                {"strategy": strategy, "method": method, "gathers": gathers, "model": name}, num_processes
            )
            files = predicted(
                Path(name), strategy=strategy, method=method, num_processes=num_processes, gathers=gathers
            )
            error = files.total_bytes / measured - 1
            print(
                f"{title:24} {measured:13,} bytes measured {files.total_bytes:13,} predicted {error:+7.2%}", flush=True
            )


if __name__ == "__main__":
    main()
