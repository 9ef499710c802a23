"""Traces every configuration of a folder: ``python -m bench.sweep FOLDER [--only REGEX] [--micro-batch N]``.

Each ``<owner>__<name>.json`` is a model's ``config.json``. A row says the model's parameters, the processor seconds
that its profile and its default step took beyond imports, and the reason where it cannot be traced, which is one line.
Beside FOLDER may lie ``models.tsv`` with a column ``id``, one of parameters counted elsewhere (``n_params_counted``),
one of those published and ``match``; a row whose ``match`` begins with ``exact`` must have one of the two numbers.
Exits 1 where a bar is missed: a count that differs, a trace longer than 6 s (12 s for a mixture of experts), a reason
of more than one line, a program that cannot be read.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from launchkit.errors import LaunchkitError, ProgramError
from launchkit.planner import program_key
from launchkit.planner.point import point_of
from launchkit.scenario import Attention, Batch, DeviceKind, Scenario, Training
from launchkit.simulate.memory import read_memory

DENSE_SECONDS, MOE_SECONDS = 6.0, 12.0
PRELOADED = ["torch", "transformers", "peft", "launchkit.trace"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one model: ``reason`` is empty where it was traced."""

    name: str
    num_parameters: int = 0
    num_active_parameters: int = 0
    seconds: float = 0.0
    reason: str = ""

    @property
    def bar_seconds(self) -> float:
        return MOE_SECONDS if self.num_active_parameters else DENSE_SECONDS


def trace(name: str, config: Mapping[str, object], *, micro_batch: int) -> Outcome:
    """Profiles and traces one model as ``launchkit estimate`` would that has never seen it, on a GPU."""
    from launchkit.trace import profile_model, trace_model

    start = time.process_time()
    try:
        profile = profile_model(config, name=name)
        attention = Attention.SDPA if Attention.SDPA in profile.attentions else Attention.EAGER
        scenario = Scenario(training=Training(attention=attention), batch=Batch(micro_batch=micro_batch))
        program = trace_model(config, program_key(scenario, profile, DeviceKind.CUDA))
        seconds = time.process_time() - start
        read_memory(program, point_of(scenario))  # which a program that frees what is not there does not survive
    except ProgramError as error:
        return Outcome(name=name, seconds=seconds, reason=f"its program is broken\n{error}")
    except LaunchkitError as error:
        return Outcome(name=name, seconds=time.process_time() - start, reason=str(error))
    return Outcome(
        name=name,
        num_parameters=profile.num_parameters,
        num_active_parameters=profile.num_active_parameters,
        seconds=seconds,
    )


def run(sender: Connection, name: str, config: Mapping[str, object], micro_batch: int) -> None:
    """``trace`` in a process of its own."""
    import torch

    torch.set_num_threads(1)
    sender.send(trace(name, config, micro_batch=micro_batch))


def apart(name: str, config: Mapping[str, object], *, micro_batch: int) -> Outcome:
    """``trace`` in a fresh process, forked from one that has imported the libraries and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(sender, name, config, micro_batch))
    process.start()
    sender.close()
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        outcome = Outcome(name=name, reason="the tracer raised no error of launchkit's own\n(see its output above)")
    process.join()
    return outcome


def known_counts(path: Path) -> dict[str, set[int]]:
    """The parameter counts that a model of the table may have, by id, where the table is sure of them."""
    if not path.is_file():
        return {}
    with path.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines, delimiter="\t") if row["match"].startswith("exact")]
    return {row["id"]: {int(row["n_params_counted"]), int(row["n_params_published"])} for row in rows}


def misses(outcome: Outcome, counts: set[int]) -> list[str]:
    """The bars that a model misses."""
    found = []
    if "\n" in outcome.reason:
        found.append("its reason takes more than one line")
    if not outcome.reason and counts and outcome.num_parameters not in counts:
        found.append(f"{outcome.num_parameters:,} parameters, not {' or '.join(f'{n:,}' for n in sorted(counts))}")
    if outcome.seconds > outcome.bar_seconds:
        found.append(f"{outcome.seconds:.1f} s, more than {outcome.bar_seconds:g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="configurations as <owner>__<name>.json")
    parser.add_argument("--only", default="", metavar="REGEX", help="models whose id matches")
    parser.add_argument("--micro-batch", type=int, default=1, metavar="N", help="sequences in the step [1]")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    counts = known_counts(arguments.folder.parent / "models.tsv")
    num_models = num_traced = num_missed = 0
    print(f"{'model':44} {'parameters':>16} {'seconds':>8}")
    for path in sorted(arguments.folder.glob("[!_]*.json")):
        name = path.stem.replace("__", "/")
        if not re.search(arguments.only, name, re.IGNORECASE):
            continue
        outcome = apart(name, json.loads(path.read_text()), micro_batch=arguments.micro_batch)
        missed = misses(outcome, counts.get(name, set()))
        num_models, num_traced, num_missed = (
            num_models + 1,
            num_traced + (not outcome.reason),
            num_missed + bool(missed),
        )
        print(f"{name:44} {outcome.num_parameters:16,} {outcome.seconds:8.2f}", outcome.reason, *missed, flush=True)
    print(f"{num_traced} of {num_models} traced, {num_missed} beyond a bar")
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
