"""Run records: reading ranks, proving the strategy, the comparison text."""

from __future__ import annotations

from typing import Any

import pytest

from launchkit.launch.record import (
    Metric,
    Proof,
    RankRecord,
    RunRecord,
    comparison_text,
    predicted_values,
    rank_record,
    strategy_is_live,
)
from launchkit.scenario import StrategyKind
from launchkit.serialize import encode
from launchkit.units import GIB
from tests.builders import candidate

FSDP2 = Proof(wrappers=("FSDPLlamaForCausalLM (FSDPModule)",), world_size=2)


def rank(**overrides: Any) -> RankRecord:
    values: dict[str, Any] = {
        "rank": 0,
        "device": "cpu",
        "metric": Metric.CPU_ALLOCATOR,
        "first_peak_bytes": 15 * GIB,
        "steady_peak_bytes": 16 * GIB,
        "num_steps": 4,
        "step_seconds": (9.0, 2.0, 4.0, 2.5),
        "tokens_per_step": 100,
        "proof": FSDP2,
    }
    return RankRecord(**(values | overrides))


def record(*ranks: RankRecord, **overrides: Any) -> RunRecord:
    values: dict[str, Any] = {
        "run_dir": "/runs/one",
        "command": ("python",),
        "engine": "torchrun",
        "strategy": "FSDP2",
        "exit_code": 0,
        "seconds": 20.0,
        "predicted": predicted_values(candidate(strategy="fsdp2")),
        "ranks": ranks,
        "strategy_is_live": True,
    }
    return RunRecord(**(values | overrides))


def test_rank_record_reads_back() -> None:
    assert rank_record(encode(rank())) == rank()


def test_speed_ignores_the_first_step_and_takes_the_median() -> None:
    assert rank().steady_step_seconds == 2.5
    assert rank().tokens_per_second == 40.0
    assert rank(step_seconds=()).tokens_per_second == 0.0


def test_a_run_of_one_step_shows_its_first_peak() -> None:
    assert rank(steady_peak_bytes=0).peak_bytes == 15 * GIB


@pytest.mark.parametrize(
    ("kind", "proof", "expected"),
    [
        ("single", Proof(world_size=2, num_parameters=9, num_local_parameters=5), True),  # tensor parallel
        ("single", Proof(world_size=2, num_parameters=9, num_local_parameters=9), False),
        ("single", Proof(), False),
        ("ddp", Proof(wrappers=("DistributedDataParallel",), world_size=2), True),
        ("ddp", Proof(wrappers=("DistributedDataParallel",), world_size=1), False),
        ("fsdp2", FSDP2, True),
        ("fsdp2", Proof(wrappers=("DistributedDataParallel",), world_size=2), False),
        ("fsdp2", Proof(world_size=2), False),
        ("zero2", Proof(wrappers=("DeepSpeedEngine",), world_size=2, zero_stage=2), True),
        ("zero3", Proof(wrappers=("DeepSpeedEngine",), world_size=2, zero_stage=2), False),
    ],
)
def test_strategy_is_live(kind: str, proof: Proof, expected: bool) -> None:
    assert strategy_is_live(StrategyKind(kind), [rank(proof=proof)], world_size=2) is expected


@pytest.mark.parametrize(("proof", "expected"), [(Proof(), True), (Proof(world_size=2), False)])
def test_a_single_process_is_alone(proof: Proof, expected: bool) -> None:
    assert strategy_is_live(StrategyKind.SINGLE, [rank(proof=proof)], world_size=1) is expected


def test_one_rank_without_the_strategy_is_enough_to_deny_it() -> None:
    assert strategy_is_live(StrategyKind.FSDP2, [rank(), rank(proof=Proof())], world_size=2) is False


def test_without_a_proof_nobody_knows() -> None:
    assert strategy_is_live(StrategyKind.FSDP2, [rank(proof=None)], world_size=2) is None


def test_comparison_names_the_largest_rank() -> None:
    text = comparison_text(record(rank(), rank(rank=1, steady_peak_bytes=20 * GIB)))
    assert text.splitlines() == [
        "memory: measured 20.00 GiB allocated by torch (largest rank 1, steady step) · predicted 18.00 GiB (-10.0%)",
        "speed: measured 2.5 s per step, 40 tokens/s per process · predicted 2.0 s",
        "strategy: FSDP2 in force on 2 of 2 processes (FSDPLlamaForCausalLM (FSDPModule))",
    ]


@pytest.mark.parametrize(
    ("unseen_gib", "low", "error"), [(1, "19.00 GiB", "(-5.3%)"), (3, "17.00 GiB", "(+0.0%)"), (0, None, "(-10.0%)")]
)
def test_the_error_is_against_the_nearest_of_what_may_have_been(unseen_gib: int, low: str | None, error: str) -> None:
    measured = rank(steady_peak_bytes=20 * GIB, unseen_frees_bytes=unseen_gib * GIB)
    line = comparison_text(record(measured)).splitlines()[0]
    assert line.startswith(f"memory: measured {low} to 20.00 GiB allocated" if low else "memory: measured 20.00 GiB al")
    assert line.endswith(f"predicted 18.00 GiB {error}")


@pytest.mark.parametrize(
    ("proof", "expected"),
    [
        ({"num_parameters": 6_900_000}, "6.90M parameters were trained, the plan is for 8.03B"),
        ({"num_parameters": 8_200_000_000}, ""),  # with adapters
        ({"num_parameters": 4_500_000_000}, ""),  # packed in 4 bits
        ({"num_parameters": 1_000_000, "wrappers": ("FullyShardedDataParallel",)}, ""),
        ({}, ""),
    ],
)
def test_another_model_is_not_compared(proof: dict[str, Any], expected: str) -> None:
    finished = record(rank(proof=Proof(**proof)))
    assert finished.other_model == expected
    assert ("predicted" in comparison_text(finished)) is not bool(expected)


def test_a_resident_set_is_compared_with_nothing() -> None:
    text = comparison_text(record(rank(metric=Metric.RSS)))
    assert "predicted 18" not in text


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        ({}, ""),
        ({"exit_code": 130, "stopped_by": "SIGINT"}, "interrupted; every process is gone"),
        ({"exit_code": 143, "stopped_by": "SIGTERM"}, "stopped by SIGTERM; every process is gone"),
        (
            {"exit_code": 3, "failure": "rank 1 failed first: x"},
            "the run failed with exit code 3: rank 1 failed first: x",
        ),
    ],
)
def test_ending(ended: dict[str, Any], expected: str) -> None:
    assert record(**ended).ending == expected


def test_a_run_that_was_stopped_before_it_measured_has_nothing_to_compare() -> None:
    assert comparison_text(record(exit_code=130, stopped_by="SIGINT", strategy_is_live=None)) == ""


def test_comparison_says_when_nothing_was_measured_or_live() -> None:
    text = comparison_text(record(strategy_is_live=False))
    assert text.splitlines()[0] == "memory: no rank left a measurement"
    assert "was NOT in force" in text


def test_document_is_plain_json_with_a_schema_version() -> None:
    document = record(rank()).document
    assert document["schema_version"] == 1
    assert document["ranks"][0]["proof"]["world_size"] == 2
