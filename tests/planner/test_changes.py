"""Changes of a scenario that somebody else chose: what each saves, which are enough, and that no more are taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launchkit.hardware import Cluster
from launchkit.plan import Candidate
from launchkit.planner.changes import Changes, changes
from launchkit.planner.evaluate import Bench, judge
from launchkit.planner.search import Search
from launchkit.request import Request
from launchkit.scenario import Loss, Scenario, TraceKey
from launchkit.units import GIB
from tests.builders import cluster, scenario
from tests.planner.sources import WrittenSource


def given(bench: Bench, **values: Any) -> Candidate:
    return judge(bench, scenario(**({"micro_batch": 4, "seq_len": 4096, "gradient_accumulation_steps": 2} | values)))


def bench(*, memory_gib: int = 24, num_gpus: int = 1, num_layers: int = 8) -> Bench:
    return Bench(
        source=WrittenSource(num_layers=num_layers),
        cluster=cluster(num_gpus=num_gpus, memory_bytes=memory_gib * GIB),
    )


def altered(one: Scenario, other: Scenario) -> set[str]:
    """The parts in which two scenarios differ, by their fields."""
    parts = {
        f"{name}.{field}"
        for name in ("training", "batch", "strategy")
        for field in vars(getattr(one, name))
        if getattr(getattr(one, name), field) != getattr(getattr(other, name), field)
    }
    return parts


def found(where: Bench, **values: Any) -> tuple[Candidate, Changes]:
    candidate = given(where, **values)
    return candidate, changes(where, candidate)


def test_each_change_of_one_that_does_not_fit_saves_memory_and_alters_one_setting() -> None:
    where = bench(memory_gib=24, num_gpus=4, num_layers=32)
    candidate, result = found(where, strategy="ddp", precision="bf16-params")
    assert not candidate.estimate.fits
    sets = [altered(candidate.scenario, change.candidate.scenario) for change in result.singles]
    assert {"training.checkpointing"} in sets
    assert {"batch.micro_batch", "batch.gradient_accumulation_steps"} in sets
    assert {"strategy.kind", "training.precision"} in sets  # FSDP makes fp32 shards of trained weights
    assert {"training.method"} in sets
    assert all(change.saved_bytes > 0 for change in result.singles)


def test_what_is_enough_stands_first() -> None:
    _, result = found(bench(memory_gib=10), precision="bf16-params")
    fits = [change.fits for change in result.singles]
    assert fits == sorted(fits, reverse=True)


def test_a_change_says_what_a_reading_of_it_says() -> None:
    where = bench(memory_gib=12, num_gpus=4)
    candidate, result = found(where, strategy="ddp", precision="bf16-params")
    room = Search(bench=where, request=Request())
    for change in result.singles:
        peak = where.live_peak_bytes(change.candidate.scenario)
        assert abs(candidate.estimate.allocated_peak_bytes - peak - change.saved_bytes) < 2**20
        assert change.fits is (peak <= room.room_bytes(change.candidate.scenario))


def test_together_is_only_said_where_none_is_enough_and_takes_no_more_than_it_needs() -> None:
    where = bench(memory_gib=5)
    candidate, result = found(where, precision="bf16-params", micro_batch=8)
    assert result.together is not None and result.together.fits
    assert not any(change.fits and change.time_factor for change in result.singles)
    taken = altered(candidate.scenario, result.together.candidate.scenario)
    room = Search(bench=where, request=Request())
    for name in {path.split(".")[0] for path in taken}:
        part = {name: getattr(candidate.scenario, name)}
        without = replace(result.together.candidate.scenario, **part)
        assert where.live_peak_bytes(without) > room.room_bytes(without), f"{name} could be spared"


def test_the_global_batch_is_kept() -> None:
    where = bench(memory_gib=4, num_gpus=4)
    for micro_batch in (2, 3, 4, 6):
        candidate, result = found(where, strategy="ddp", precision="bf16-params", micro_batch=micro_batch)
        size = candidate.scenario.batch.global_batch(4)
        ranks = [change.candidate.scenario.strategy.num_data_ranks(4) for change in result.singles]
        sizes = [change.candidate.scenario.batch for change in result.singles]
        assert {batch.global_batch(n) for batch, n in zip(sizes, ranks, strict=True)} == {size}
        assert any(batch.micro_batch < micro_batch for batch in sizes)


def test_one_that_fits_is_told_what_is_free_and_what_is_faster() -> None:
    where = bench(memory_gib=80)
    candidate, result = found(where, precision="bf16-params", checkpointing="full", micro_batch=1)
    assert candidate.estimate.fits
    kinds = [altered(candidate.scenario, change.candidate.scenario) for change in result.singles]
    assert {"training.checkpointing"} in kinds
    assert all(change.fits for change in result.singles)
    assert result.together is None and result.more_gpus is None
    assert not any("training.method" in kind or "batch.seq_len" in kind for kind in kinds)


@pytest.mark.parametrize(("memory_gib", "found_any"), [(6, True), (80, False)])
def test_more_gpus_are_named_where_it_does_not_fit(memory_gib: int, found_any: bool) -> None:
    where = bench(memory_gib=memory_gib)
    _, result = found(where, precision="bf16-params", checkpointing="full", micro_batch=1)
    assert (result.more_gpus is not None) is found_any
    if result.more_gpus is not None:
        wider, kind = result.more_gpus
        assert isinstance(wider, Cluster)
        assert wider.num_gpus > 1 and kind == "fsdp2"


def test_a_program_that_is_not_at_hand_is_not_asked_for() -> None:
    class Shipped(WrittenSource):
        def has_program(self, key: object) -> bool:
            return False

    source = Shipped()
    where = Bench(source=source, cluster=cluster(num_gpus=1))
    candidate = given(where, precision="bf16-params")
    asked = len(source.asked)
    assert changes(where, candidate).singles == ()
    assert len(source.asked) == asked


def test_another_loss_is_traced_where_logits_are_too_much() -> None:
    class Unshipped(WrittenSource):
        def has_program(self, key: object) -> bool:
            return False

    where = Bench(source=Unshipped(num_layers=1), cluster=cluster(num_gpus=1, memory_bytes=GIB))
    candidate = given(where, precision="bf16-params", checkpointing="full", micro_batch=64)
    asked: list[TraceKey] = where.source.asked  # type: ignore[attr-defined]
    known = set(asked)
    changes(where, candidate)
    here = where.key(candidate.scenario).compute  # FSDP2, where more GPUs are tried, computes otherwise
    assert {key.loss for key in set(asked) - known if key.compute is here} == {Loss.LIGER}


def test_sequences_are_shortened_until_it_fits() -> None:
    where = bench(memory_gib=12)
    candidate, result = found(where, precision="bf16-params", checkpointing="full", micro_batch=1, seq_len=262_144)
    lengths = [change for change in result.singles if not change.time_factor]
    assert not candidate.estimate.fits and len(lengths) == 1
    assert lengths[0].fits and lengths[0].candidate.scenario.batch.seq_len < 262_144 // 2
