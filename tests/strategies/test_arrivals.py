"""How each engine brings weights onto the device: whole, and what is left of them adds up to what it holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from launchkit import strategies
from launchkit.catalog.models import find_model
from launchkit.program import Owner, StepProgram
from launchkit.request import Request, resolve
from launchkit.strategies.ddp import BROADCAST_BUCKET_BYTES, broadcast_buckets
from launchkit.strategies.fsdp2 import unsharded_scales
from launchkit.units import MIB
from tests.builders import cluster
from tests.strategies.small import POINT

MODEL = "HuggingFaceTB/SmolLM2-135M"


def rewritten(**flags: Any) -> StepProgram:
    return traced_and_rewritten(**flags)[1]


def traced_and_rewritten(**flags: Any) -> tuple[StepProgram, StepProgram]:
    source = find_model(MODEL)
    hardware = cluster(num_gpus=2)
    scenario = resolve(Request.from_flags(flags), model=source.profile, cluster=hardware).scenario
    key = strategies.trace_key(
        scenario.training, scenario.strategy, hardware.gpu.device_kind, single_sequence=True
    ).canonical
    traced = source.program(key)
    return traced, strategies.rewrite(traced, scenario=scenario, cluster=hardware)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_every_shard_arrives_once(strategy: str, method: str) -> None:
    traced, program = traced_and_rewritten(strategy=strategy, method=method)
    held: Counter[int] = Counter()
    for size, owner, count in program.persistent:
        held[size.at(POINT)] += count if owner is Owner.WEIGHTS else 0
    for size, _, count in (*traced.persistent, *unsharded_scales(program)):  # buffers, and what is not sharded
        held[size.at(POINT)] -= count
    arrived = Counter(arrival.kept for arrival in program.arrivals if arrival.kept)
    assert arrived == +held


@pytest.mark.parametrize(
    ("flags", "waits", "is_sent"),
    [
        ({"strategy": "fsdp", "method": "lora"}, False, True),
        ({"strategy": "fsdp", "method": "lora", "trainer": "loop"}, False, False),
        ({"strategy": "fsdp", "method": "qlora"}, True, True),
        ({"strategy": "fsdp2", "method": "qlora"}, True, False),
    ],
)
def test_where_weights_wait(flags: dict[str, str], waits: bool, is_sent: bool) -> None:
    """4-bit weights are made on the device and wait there for their unit; others come from the host."""
    arrivals = rewritten(**flags).arrivals
    assert {arrival.waits for arrival in arrivals} == {waits}
    assert any(arrival.passing for arrival in arrivals) is is_sent


def test_fsdp2_brings_whole_weights() -> None:
    program = rewritten(strategy="fsdp2", method="full")
    pieces = sum(sum(arrival.pieces) for arrival in program.arrivals)
    assert pieces == pytest.approx(4 * program.num_parameters(), rel=1e-3)
    assert sum(arrival.kept for arrival in program.arrivals) == pytest.approx(pieces / 2, rel=1e-3)


def test_ddp_sends_all_weights() -> None:
    program = rewritten(strategy="ddp", method="full")
    (arrival,) = program.arrivals
    assert sum(arrival.passing) == 4 * program.num_parameters()
    assert min(arrival.passing[:-1]) >= BROADCAST_BUCKET_BYTES


def test_buckets_close_with_the_tensor_that_fills_them() -> None:
    assert list(broadcast_buckets([100 * MIB] * 4)) == [300 * MIB, 100 * MIB]
    assert list(broadcast_buckets([])) == []
