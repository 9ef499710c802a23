"""Predicted peaks beside those of torch's own allocator in real steps, each run in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.accuracy.cell import Cell
from bench.accuracy.cells import LLAMA
from launchkit import planner
from launchkit.hardware import Backend
from launchkit.model import ModelProfile
from launchkit.program import StepProgram
from launchkit.request import Request, resolve
from launchkit.scenario import TraceKey
from launchkit.trace import profile_model, trace_model
from tests.builders import cluster

ROOT = Path(__file__).parents[2]
CELLS = (
    Cell(name="full", config=LLAMA),
    Cell(name="bf16 autocast, checkpointed", config=LLAMA, precision="bf16", checkpointing="full"),
    Cell(name="lora", config=LLAMA, method="lora", precision="bf16"),
    Cell(name="lora, re-entrant", config=LLAMA, method="lora", precision="bf16", checkpointing="reentrant"),
)
FLAGS = ("method", "precision", "checkpointing", "optimizer", "trainer", "micro_batch", "seq_len")

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Traced:
    """A model source that traces what it is asked for."""

    config: dict[str, Any]
    profile: ModelProfile = field(init=False)

    def __post_init__(self) -> None:
        self.profile = profile_model(self.config, name="it")

    def program(self, key: TraceKey) -> StepProgram:
        return trace_model(self.config, key)

    def has_program(self, key: TraceKey) -> bool:
        return False


def measured(cell: Cell, directory: Path) -> dict[str, Any]:
    file, out = directory / "cell.json", directory / "measured.json"
    file.write_text(cell.to_json())
    command = [sys.executable, "-m", "bench.accuracy.measure", str(file), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_peak_is_the_real_allocators(cell: Cell, tmp_path: Path) -> None:
    found = measured(cell, tmp_path)
    source = Traced(dict(cell.config))
    hardware = cluster(num_gpus=1, backend=Backend.CPU)
    flags = {name: getattr(cell, name) for name in FLAGS} | {"lora_rank": cell.lora_rank}
    for state in ("first", "steady"):
        request = Request.from_flags(flags | {"state": state})
        scenario = resolve(request, model=source.profile, cluster=hardware).scenario
        predicted = planner.estimate(source, cluster=hardware, scenario=scenario).estimate.allocated_peak_bytes
        low, high = found[f"{state}_peak_bytes"]
        assert low == high, "one process has no range"
        assert predicted == pytest.approx(high, rel=1e-3), state
