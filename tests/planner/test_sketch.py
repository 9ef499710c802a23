"""What is shown beside the chosen candidate, by the cheap reading, against the run through the allocator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

import launchkit
from launchkit import planner, strategies
from launchkit.api import find_cluster
from launchkit.catalog.models import find_model
from launchkit.plan import Candidate, Plan
from launchkit.planner.evaluate import Bench, judge, sketch
from launchkit.planner.search import Search
from launchkit.request import Request
from launchkit.scenario import Checkpointing, Scenario

CLOSEST_READING = 0.02  # of what is allocated: remainders that are not split off blocks, most of small models


def searched(search: Search) -> Iterator[Scenario]:
    for method in search.methods():
        for strategy in search.strategies():
            base = search.base(method, strategy)
            for checkpointing in (Checkpointing.FULL, Checkpointing.NONE):
                scenario = replace(base, training=replace(base.training, checkpointing=checkpointing))
                if not strategies.refusal(scenario, search.bench.source.profile, search.bench.cluster_of(scenario)):
                    yield scenario


@pytest.mark.parametrize(
    ("model", "gpus", "method"),
    [("Qwen/Qwen3-0.6B", "2x3090", "lora"), ("gpt2", "1x4090", None), ("gpt2", "2xcpu", None)],
)
def test_the_range_of_a_sketch_holds_what_the_allocator_says(model: str, gpus: str, method: str | None) -> None:
    bench = Bench(source=find_model(model), cluster=find_cluster(gpus))
    scenarios = list(searched(Search(bench=bench, request=Request.from_flags({"method": method}))))
    assert len(scenarios) >= 8
    for scenario in scenarios:
        cheap, full = sketch(bench, scenario).estimate, judge(bench, scenario).estimate
        assert cheap.device_peak_low_bytes <= full.device_peak_bytes <= cheap.device_peak_high_bytes
        assert cheap.device_peak_high_bytes >= full.device_peak_high_bytes
        assert 0 <= 1 - cheap.allocated_peak_bytes / full.allocated_peak_bytes <= CLOSEST_READING
        assert full.is_simulated and not cheap.is_simulated


def shown(plan: Plan) -> list[Candidate]:
    return [*plan.alternatives, *(item.candidate for item in plan.rejected)]


@pytest.mark.parametrize(("model", "gpus"), [("Qwen/Qwen3-8B", "4x4090"), ("meta-llama/Llama-3.1-8B", "2xA100-80GB")])
def test_what_also_fits_does(model: str, gpus: str) -> None:
    plan = launchkit.plan(model, gpus=gpus)
    assert plan.alternatives
    for candidate in plan.alternatives:
        full = planner.estimate(find_model(model), cluster=plan.cluster, scenario=candidate.scenario)
        assert full.estimate.fits, candidate.scenario


def test_in_full_every_figure_is_the_one_of_estimate() -> None:
    plan = launchkit.plan("Qwen/Qwen3-0.6B", gpus="2x3090", seq_len=8192, in_full=True)
    assert len(shown(plan)) >= 4
    for candidate in shown(plan):
        full = planner.estimate(find_model("Qwen/Qwen3-0.6B"), cluster=plan.cluster, scenario=candidate.scenario)
        assert candidate.estimate == full.estimate
    assert all(candidate.estimate.fits for candidate in plan.alternatives)


def test_one_scenario_fits_for_plan_where_it_does_for_estimate() -> None:
    """The search allows for more of a cache than this one adds, and its run shows that there is room."""
    asked = {"gpus": "24GiB", "method": "full", "strategy": "single", "micro_batch": 1, "checkpointing": "full"}
    found = set()
    for seq_len in range(2048, 32768, 2048):
        flags = {**asked, "global_batch": 1, "seq_len": seq_len}
        fits = launchkit.estimate("Qwen/Qwen3-0.6B", **flags).estimate.fits
        assert (launchkit.plan("Qwen/Qwen3-0.6B", offload="none", **flags).chosen is not None) is fits
        found.add(fits)
    assert found == {True, False}


def test_what_would_fit_does() -> None:
    """Typed as it is printed, every suggestion gives a plan."""
    asked = {"gpus": "1x4090", "method": "full", "strategy": "single", "offload": "none"}
    plan = launchkit.plan("Qwen/Qwen3-1.7B", **asked)
    assert plan.chosen is None
    settings = [suggestion for suggestion in plan.suggestions if "--gpus" not in suggestion.flags]
    assert len(settings) >= 2
    for suggestion in settings:
        words = suggestion.flags.split()
        flags = dict(zip((word[2:].replace("-", "_") for word in words[::2]), words[1::2], strict=True))
        assert launchkit.plan("Qwen/Qwen3-1.7B", **{**asked, **flags}).chosen is not None, suggestion
