"""How long whole commands take: ``python -m bench.speed [--runs N]``.

Each command runs in turn with a bare interpreter, so the ratio holds when the machine's speed drifts. Medians are
printed; the bars are those of the project: 0.5 s for a plan, 0.2 s for ``--help``, 6 s beyond imports for a trace of
an unknown model of 8 billion parameters, at no more than 1.5 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHKIT = (sys.executable, "-m", "launchkit")
BASELINE = (sys.executable, "-c", "pass")
IMPORTS = (sys.executable, "-c", "import torch, transformers, peft")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median seconds of a command and of its baseline, run in turn, and the command's largest resident size."""

    seconds: float
    baseline_seconds: float
    peak_rss_bytes: int


def run_once(command: Sequence[str], *, cwd: str, environment: dict[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.decode()[-500:]}")
    return time.perf_counter() - start


def measure(command: Sequence[str], *, baseline: Sequence[str], runs: int, fresh_home: bool = False) -> Timing:
    """Runs ``baseline`` and ``command`` in turn after one warm-up; with ``fresh_home`` nothing stays cached."""
    with tempfile.TemporaryDirectory() as folder:
        times: list[float] = []
        baselines: list[float] = []
        for number in range(runs + 1):
            home = f"{folder}/{number if fresh_home else 0}"
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "LAUNCHKIT_HOME": home, "HF_HUB_OFFLINE": "1"}
            before = run_once(baseline, cwd=folder, environment=environment)
            taken = run_once(command, cwd=folder, environment=environment)
            if number:
                baselines.append(before)
                times.append(taken)
    rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Timing(seconds=statistics.median(times), baseline_seconds=statistics.median(baselines), peak_rss_bytes=rss)


def unknown_model() -> dict[str, object]:
    """A dense model of 8 billion parameters that no catalogue holds."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14400,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128512,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    print(f"{'command':44} {'seconds':>8} {'beyond':>8} {'ratio':>7}   bar")
    for name, arguments, bar in (
        ("--help", ("--help",), 0.2),
        ("plan Qwen/Qwen3-8B --gpus 4x4090", ("plan", "Qwen/Qwen3-8B", "--gpus", "4x4090", "--json"), 0.5),
        (
            "plan meta-llama/Llama-3.1-8B --gpus 128x8xH100",
            ("plan", "meta-llama/Llama-3.1-8B", "--gpus", "128x8xH100", "--json"),
            2.0,
        ),
    ):
        timing = measure((*LAUNCHKIT, *arguments), baseline=BASELINE, runs=runs)
        show(name, timing, bar=f"{bar} s")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(unknown_model(), file)
        file.flush()
        command = (*LAUNCHKIT, "estimate", "unknown-8b", "--config", file.name, "--gpus", "H100", "--json")
        timing = measure(command, baseline=IMPORTS, runs=max(1, runs // 2), fresh_home=True)
    show("estimate of an unknown 8B model", timing, bar="6 s beyond imports")
    print(f"largest resident size of all: {timing.peak_rss_bytes / 1024**3:.2f} GiB (bar 1.5)")


def show(name: str, timing: Timing, *, bar: str) -> None:
    beyond = timing.seconds - timing.baseline_seconds
    ratio = timing.seconds / timing.baseline_seconds
    print(f"{name:44} {timing.seconds:8.3f} {beyond:8.3f} {ratio:7.1f}   {bar}")


if __name__ == "__main__":
    main()
