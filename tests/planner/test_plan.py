"""What a plan prefers, what it keeps, and what it says where nothing fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

import launchkit
from launchkit import planner, strategies
from launchkit.errors import IllegalScenarioError
from launchkit.export.axolotl import axolotl_config
from launchkit.hardware import Cluster
from launchkit.plan import Candidate, Plan
from launchkit.planner.choose import SAME_SPEED, _ranking
from launchkit.planner.search import Option
from launchkit.request import Request
from launchkit.scenario import Checkpointing, Method, Offload, Precision, StrategyKind
from launchkit.serialize import document_text, plan_document
from launchkit.units import GIB
from tests.builders import cluster, scenario, step_time
from tests.planner.sources import WrittenSource

AMPLE_HOST_BYTES = 4096 * GIB


def made(num_layers: int, *, num_gpus: int = 1, host_bytes: int = AMPLE_HOST_BYTES, **flags: Any) -> Plan:
    return planner.plan(
        WrittenSource(num_layers), cluster=hosted(num_gpus, host_bytes), request=Request.from_flags(flags)
    )


def hosted(num_gpus: int, host_bytes: int) -> Cluster:
    gpus = cluster(num_gpus=num_gpus)
    return replace(gpus, node=replace(gpus.node, host_memory_bytes=host_bytes))


def shown(plan: Plan) -> list[Candidate]:
    chosen = [plan.chosen] if plan.chosen else []
    return [*chosen, *plan.alternatives, *(rejected.candidate for rejected in plan.rejected)]


def chosen_of(plan: Plan) -> Candidate:
    assert plan.chosen is not None
    return plan.chosen


@pytest.mark.parametrize(
    ("num_layers", "method", "offload"),
    [
        (2, Method.FULL, Offload.NONE),
        (40, Method.LORA, Offload.NONE),
        (150, Method.QLORA, Offload.NONE),
        (350, Method.FULL, Offload.ALL),
    ],
)
def test_full_then_lora_then_qlora_then_offload(num_layers: int, method: Method, offload: Offload) -> None:
    chosen = chosen_of(made(num_layers)).scenario
    assert (chosen.training.method, chosen.strategy.offload) == (method, offload)


@pytest.mark.parametrize(("num_layers", "kind"), [(2, StrategyKind.DDP), (12, StrategyKind.FSDP2)])
def test_several_gpus_are_sharded_only_when_they_have_to_be(num_layers: int, kind: StrategyKind) -> None:
    assert chosen_of(made(num_layers, num_gpus=4)).scenario.strategy.kind is kind


def test_what_the_allocator_run_finds_too_large_is_rejected_with_its_range() -> None:
    """HSDP passes the cheap reading and leads the ranking; its run shows that the top of the range is too much."""
    plan = launchkit.plan("Qwen/Qwen3-30B-A3B", gpus="2x8xH100", method="full")
    reasons = {r.candidate.scenario.strategy.kind: r.reason for r in plan.rejected}
    assert reasons[StrategyKind.HSDP].startswith("may reach")
    assert StrategyKind.HSDP not in {a.scenario.strategy.kind for a in plan.alternatives}


def test_a_smaller_batch_is_tried_where_the_allocator_run_finds_the_largest_too_large() -> None:
    """Two sequences pass the cheap reading, and fragmentation then takes them over the edge; one fits with ease."""
    asked: dict[str, Any] = {"gpus": "2x8xH100", "method": "full", "strategy": "zero3", "precision": "bf16-params"}
    two = launchkit.estimate(
        "meta-llama/Llama-3.1-70B", **asked, seq_len=5120, micro_batch=2, global_batch=32, checkpointing="full"
    )
    assert not two.estimate.fits
    plan = launchkit.plan("meta-llama/Llama-3.1-70B", **asked, seq_len=5120)
    assert chosen_of(plan).scenario.batch.micro_batch == 1
    assert two.scenario not in {r.candidate.scenario for r in plan.rejected}


def test_fsdp_is_tried_without_accumulation_where_whole_gradients_would_not_fit() -> None:
    """Accumulating under FSDP keeps gradients unsharded: one pass of two sequences fits where two of one do not."""
    plan = launchkit.plan("Qwen/Qwen3-30B-A3B", gpus="2x8xH100", method="full", strategy="fsdp2")
    assert chosen_of(plan).scenario.batch.gradient_accumulation_steps == 1
    two = launchkit.estimate(
        "Qwen/Qwen3-30B-A3B", gpus="2x8xH100", strategy="fsdp2", checkpointing="full", global_batch=32
    )
    assert not two.estimate.fits


def test_offload_needs_host_memory() -> None:
    """47 billion parameters under AdamW do not go into 256 GiB, whatever the GPU holds."""
    plan = made(350, host_bytes=256 * GIB)
    if plan.chosen is not None:
        assert plan.chosen.estimate.host_peak_bytes <= 256 * GIB
    assert chosen_of(made(350)).estimate.host_peak_bytes > 256 * GIB
    lacking = [r.reason for r in plan.rejected if r.candidate.estimate.host_peak_bytes > 256 * GIB]
    assert lacking and all(reason.startswith("host memory") for reason in lacking)


def test_nothing_is_suggested_that_the_host_has_no_room_for() -> None:
    """Shorter sequences need as much of it, and so do twice the GPUs of a node that is full."""
    plan = made(350, host_bytes=256 * GIB, method="full", offload="all")
    assert plan.chosen is None
    assert not [s.flags for s in plan.suggestions if s.flags.startswith("--seq-len")]


def test_unknown_host_memory_is_taken_to_be_enough() -> None:
    assert chosen_of(made(350, host_bytes=0)).scenario.strategy.offload is Offload.ALL


def of_unknown_host(num_gpus: int, *, plausible_gib: int) -> Cluster:
    gpus = cluster(num_gpus=num_gpus)
    return replace(gpus, node=replace(gpus.node, host_memory_bytes=0, plausible_host_bytes=plausible_gib * GIB))


@pytest.mark.parametrize(("plausible_gib", "method"), [(0, Method.FULL), (1024, Method.FULL), (24, Method.LORA)])
def test_a_host_of_likely_size_is_preferred(plausible_gib: int, method: Method) -> None:
    """A full fine-tune of 1.6 billion parameters loads 26 GB of fp32 copies in four processes; adapters load none."""
    request = Request.from_flags({"strategy": "fsdp2", "offload": "none"})
    gpus = of_unknown_host(4, plausible_gib=plausible_gib)
    plan = planner.plan(WrittenSource(12), cluster=gpus, request=request)
    assert chosen_of(plan).scenario.training.method is method
    assert {Method.FULL, Method.LORA} <= {candidate.scenario.training.method for candidate in shown(plan)}


def test_a_rare_host_is_said_where_there_is_no_other_way() -> None:
    gpus = cluster(num_gpus=1)
    gpus = replace(gpus, node=replace(gpus.node, host_memory_bytes=0, plausible_host_bytes=64 * GIB))
    chosen = chosen_of(planner.plan(WrittenSource(350), cluster=gpus, request=Request()))
    assert chosen.estimate.host_needed_bytes > 64 * GIB
    assert [
        note
        for note in chosen.notes
        if note.endswith("seldom have more than 64.0 GiB; --host-memory says what yours have")
    ]


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("num_layers", [2, 30])
@pytest.mark.parametrize("global_batch", [None, 64])
def test_accumulation_keeps_the_global_batch(num_gpus: int, num_layers: int, global_batch: int | None) -> None:
    plan = made(num_layers, num_gpus=num_gpus, global_batch=global_batch)
    for candidate in shown(plan):
        ranks = 1 if candidate.scenario.strategy.kind is StrategyKind.SINGLE else num_gpus
        assert candidate.scenario.batch.global_batch(ranks) == (global_batch or 32)


@pytest.mark.parametrize(
    ("num_gpus", "flags", "advice"),
    [
        (4, {"global_batch": 30}, "no multiple of 4 GPUs; use --global-batch 32"),
        (4, {"global_batch": 2}, "no multiple of 4 GPUs; use --global-batch 4"),
        (1, {"global_batch": 32, "micro_batch": 3}, "no multiple of --micro-batch 3; use --global-batch 33"),
    ],
)
def test_a_global_batch_that_cannot_be_shared_is_refused(num_gpus: int, flags: dict[str, int], advice: str) -> None:
    with pytest.raises(IllegalScenarioError, match=advice):
        made(2, num_gpus=num_gpus, **flags)


@pytest.mark.parametrize("num_gpus", [1, 4])
@pytest.mark.parametrize("num_layers", [2, 12, 40, 100])
def test_what_is_chosen_fits_at_the_top_of_its_range(num_layers: int, num_gpus: int) -> None:
    estimate = chosen_of(made(num_layers, num_gpus=num_gpus)).estimate
    assert estimate.device_peak_low_bytes <= estimate.device_peak_bytes <= estimate.device_peak_high_bytes
    assert estimate.device_peak_high_bytes <= estimate.device_usable_bytes


def test_nothing_fits_is_an_answer() -> None:
    plan = made(350, host_bytes=64 * GIB)
    assert plan.chosen is None and not plan.alternatives
    assert plan.rejected
    assert plan.suggestions
    assert all(suggestion.flags.startswith("--") for suggestion in plan.suggestions)


JUST_AS_FAST, FASTER = 1 + SAME_SPEED * 0.9, 1 + SAME_SPEED * 1.1


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ({"ddp": JUST_AS_FAST, "fsdp2": 1.0}, "ddp"),
        ({"ddp": FASTER, "fsdp2": 1.0}, "fsdp2"),
        ({"zero3": 1.0, "zero2": 1.01, "fsdp2": JUST_AS_FAST}, "fsdp2"),
        ({"ddp": 1.0, "fsdp2": 1.0}, "ddp"),
    ],
)
def test_a_simpler_engine_wins_where_the_clock_sees_no_difference(seconds: dict[str, float], winner: str) -> None:
    assert 0.05 <= SAME_SPEED <= 0.1
    options = [
        Option(scenario=scenario(strategy=kind), live_bytes=0, fits=True, step=step_time(seconds=time))
        for kind, time in seconds.items()
    ]
    assert _ranking(options)[0].scenario.strategy.kind == winner
    assert _ranking(options[::-1]) == _ranking(options)


def test_the_fuller_method_and_no_offload_come_first_however_slow() -> None:
    ranked = _ranking(
        [
            Option(scenario=scenario(**fields), live_bytes=0, fits=True, step=step_time(seconds=time))
            for time, fields in (
                (1.0, {"strategy": "zero2", "offload": "optimizer", "method": "full"}),
                (2.0, {"method": "qlora"}),
                (3.0, {"method": "lora"}),
                (9.0, {"method": "full"}),
            )
        ]
    )
    assert [option.scenario.training.method for option in ranked] == ["full", "lora", "qlora", "full"]
    assert ranked[-1].scenario.strategy.offload is Offload.OPTIMIZER


@pytest.mark.parametrize(
    "flags",
    [
        {"method": "lora"},
        {"strategy": "fsdp2"},
        {"strategy": "zero3", "offload": "all"},
        {"checkpointing": "none"},
        {"checkpointing": "full", "micro_batch": 2},
        {"seq_len": 512, "precision": "bf16-pure", "optimizer": "sgd"},
        {"method": "lora", "lora_rank": 64},
    ],
    ids=str,
)
def test_flags_narrow_the_search(flags: dict[str, Any]) -> None:
    for candidate in shown(made(12, num_gpus=4, **flags)):
        built = candidate.scenario
        values = {
            **vars(built.training),
            **vars(built.batch),
            "strategy": built.strategy.kind,
            "offload": built.strategy.offload,
        }
        assert {name: values[name] for name in flags} == flags


def test_what_an_engine_refuses_is_said() -> None:
    volta = cluster(num_gpus=1, bf16_flops_per_s=0.0)
    with pytest.raises(IllegalScenarioError, match="no bf16; use --precision fp16"):
        planner.plan(WrittenSource(2), cluster=volta, request=Request.from_flags({"precision": "bf16"}))


def test_4_bit_weights_are_never_proposed_under_zero() -> None:
    for candidate in shown(made(100, num_gpus=4)):
        training, kind = candidate.scenario.training, candidate.scenario.strategy.kind
        assert not (training.method is Method.QLORA and kind.zero_stage)


def test_a_method_that_cannot_be_traced_is_passed_over() -> None:
    source = WrittenSource(2, untraceable=(Method.FULL,))
    plan = planner.plan(source, cluster=cluster(num_gpus=1), request=Request())
    assert chosen_of(plan).scenario.training.method is Method.LORA


@pytest.mark.parametrize(("num_layers", "num_gpus"), [(2, 1), (30, 4), (350, 1)])
def test_equal_arguments_give_equal_plans(num_layers: int, num_gpus: int) -> None:
    first, second = made(num_layers, num_gpus=num_gpus), made(num_layers, num_gpus=num_gpus)
    assert first == second
    assert document_text(plan_document(first)) == document_text(plan_document(second))


@pytest.mark.parametrize(
    ("num_gpus", "most_rewritten", "most_considered"),
    [
        (1, 3 * 2 + 4, 3 * 2 * 7 + 2),  # methods × checkpointing, those that fit none and the chosen one's first step
        (4, 4 * 3 * 2 + 4, 4 * 3 * 2 * 5 + 2),  # and strategies; micro-batches from 1 to 8
    ],
)
def test_a_plan_rewrites_few_programs_and_reads_few_scenarios(
    num_gpus: int, most_rewritten: int, most_considered: int
) -> None:
    source = WrittenSource(2)
    with mock.patch.object(strategies, "rewrite", wraps=strategies.rewrite) as rewrite:
        plan = planner.plan(source, cluster=cluster(num_gpus=num_gpus), request=Request())
    assert rewrite.call_count <= most_rewritten
    assert plan.num_considered <= most_considered


@pytest.mark.parametrize(("num_layers", "num_gpus"), [(2, 1), (2, 4), (30, 1), (30, 4), (350, 4)])
@pytest.mark.parametrize("flags", [{}, {"method": "lora"}, {"strategy": "zero3"}])
def test_programs_of_several_sequences_are_expected_before_they_are_asked_for(
    num_layers: int, num_gpus: int, flags: dict[str, Any]
) -> None:
    """Where something fits without offload, and is not only suggested."""
    source = WrittenSource(num_layers)
    planner.plan(source, cluster=cluster(num_gpus=num_gpus), request=Request.from_flags(flags))
    unexpected = set(source.asked) - set(source.expected)
    assert source.expected
    assert not {key for key in unexpected if not key.single_sequence}


def test_checkpointing_is_dropped_where_there_is_room() -> None:
    assert chosen_of(made(2)).scenario.training.checkpointing is Checkpointing.NONE
    assert chosen_of(made(30, num_gpus=4)).scenario.training.checkpointing is Checkpointing.FULL


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("gpus", ["4x3090", "2x8xH100"])
def test_what_is_planned_for_axolotl_can_be_written_for_it(method: str, gpus: str) -> None:
    plan = launchkit.plan("Qwen/Qwen3-8B", gpus=gpus, method=method, trainer="axolotl")
    assert axolotl_config(chosen_of(plan), plan.cluster)["base_model"] == "Qwen/Qwen3-8B"


def test_adapters_under_axolotl_s_fsdp_are_planned_under_autocast() -> None:
    plan = launchkit.plan("Qwen/Qwen3-8B", gpus="4x3090", method="qlora", trainer="axolotl", strategy="fsdp2")
    assert chosen_of(plan).scenario.training.precision is Precision.BF16


def fits_on(gib: int, **flags: Any) -> bool:
    found = launchkit.estimate("Qwen/Qwen3-8B", gpus=f"4x{gib}GiB", checkpointing="full", seq_len=1024, **flags)
    return found.estimate.fits


@pytest.mark.parametrize(("strategy", "method"), [("fsdp", "qlora"), ("fsdp2", "qlora"), ("fsdp2", "lora")])
def test_what_fits_fits_on_every_larger_device(strategy: str, method: str) -> None:
    """Also between, where the allocator has to give back what it has cached."""
    found = [fits_on(gib, strategy=strategy, method=method) for gib in range(7, 21)]
    assert found == sorted(found)
    assert set(found) == {False, True}


def test_a_cache_that_would_not_fit_is_given_back() -> None:
    """4-bit weights are whole on each GPU before they are sharded; what is left of them need not fit."""
    asked: dict[str, Any] = {"strategy": "fsdp", "method": "qlora", "checkpointing": "full", "seq_len": 1024}
    roomy = launchkit.estimate("Qwen/Qwen3-8B", gpus="4x24GiB", **asked)
    tight = launchkit.estimate("Qwen/Qwen3-8B", gpus="4x14GiB", **asked)
    assert tight.estimate.fits
    assert roomy.estimate.device_peak_bytes > 14 * GIB > tight.estimate.device_peak_high_bytes
    assert roomy.estimate.allocated_peak_bytes == tight.estimate.allocated_peak_bytes
    assert any("given back once" in note for note in tight.notes)
    assert any("made whole on every GPU" in note for note in roomy.notes)
