"""Plans as documents: what comes back is equal, and what is no plan is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from launchkit.errors import PlanFileError
from launchkit.plan import Plan
from launchkit.program import Owner
from launchkit.scenario import FsdpSettings, Offload, Scenario, Sharding, Strategy, StrategyKind, ZeroSettings
from launchkit.serialize import candidate_document, document_text, plan_document, plan_from_document, plan_from_text
from tests.report import plans


def _every_setting_changed() -> Plan:
    strategy = Strategy(
        kind=StrategyKind.HSDP,
        offload=Offload.ALL,
        fsdp=FsdpSettings(sharding=Sharding.HYBRID_SHARD_ZERO2, shard_group_size=4),
        zero=ZeroSettings(reduce_bucket_size=1, overlap_comm=False, nvme_path="/nvme"),
    )
    return plans.plan(chosen=plans.candidate(of=replace(plans.scenario(), strategy=strategy), notes=("take care",)))


@pytest.mark.parametrize("plan", [plans.plan(), plans.nothing_fits(), _every_setting_changed()])
def test_a_plan_comes_back_equal(plan: Plan) -> None:
    assert plan_from_text(document_text(plan_document(plan)), name="plan.json") == plan


def test_documents_are_deterministic() -> None:
    assert document_text(plan_document(plans.plan())) == document_text(plan_document(plans.plan()))


def test_estimate_document_has_the_contract_s_keys() -> None:
    document = candidate_document(plans.candidate(), cluster=plans.CLUSTER)
    assert {"schema_version", "launchkit", "model", "scenario", "estimate", "step", "notes"} <= set(document)
    assert {"name", "num_parameters", "num_trainable", "source"} <= set(document["model"])
    assert set(document["estimate"]["at_peak"]) == {*Owner, "cuda_context", "nccl", "fragmentation"}
    assert document["estimate"]["fits"] is True
    assert document["scenario"] | {"gpus": "2xRTX-4090", "strategy": "fsdp2", "lora_rank": 16} == document["scenario"]
    assert document["scenario"]["global_batch"] == 32
    assert document["scenario"]["gradient_accumulation_steps"] == 16


def test_plan_document_has_the_contract_s_keys() -> None:
    document = plan_document(plans.plan())
    assert {"schema_version", "request", "cluster", "chosen", "alternatives", "rejected", "notes"} <= set(document)
    assert {"scenario", "reason", "estimate"} <= set(document["rejected"][0])
    assert plan_document(plans.nothing_fits())["chosen"] is None


def _without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for name in path[:-1]:
            document = document[name]
        del document[path[-1]]

    return change


def _with(value: object, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("kind"), "is not a plan of launchkit"),
        (_with(2, "schema_version"), "schema_version 2, this launchkit reads 1"),
        (_without("chosen"), "chosen is missing"),
        (_without("chosen", "estimate", "host_peak_bytes"), "chosen.estimate.host_peak_bytes is missing"),
        (
            _with("12", "chosen", "estimate", "host_peak_bytes"),
            "chosen.estimate.host_peak_bytes is '12' where a int belongs",
        ),
        (_with(True, "chosen", "estimate", "host_peak_bytes"), "host_peak_bytes is True where a int belongs"),
        (
            _with(1.5, "chosen", "estimate", "at_peak", "logits"),
            "chosen.estimate.at_peak.logits is 1.5 where a int belongs",
        ),
        (_with("zero4", "chosen", "scenario", "strategy"), "chosen.scenario.kind is 'zero4', not one of single, ddp"),
        (_with([], "chosen"), "chosen is [] where a dict belongs"),
        (_with({}, "alternatives"), "alternatives is {} where a list belongs"),
        (_with([{}], "rejected"), "rejected[0].model is missing"),
        (_with([8], "cluster", "gpu", "compute_capability"), "cluster.gpu.compute_capability has 1 items instead of 2"),
    ],
)
def test_a_damaged_plan_names_the_damage(change: Callable[[dict[str, Any]], None], message: str) -> None:
    document = json.loads(document_text(plan_document(plans.plan())))
    change(document)
    with pytest.raises(PlanFileError) as raised:
        plan_from_document(document, name="plan.json")
    assert message in str(raised.value)
    assert str(raised.value).startswith("plan.json ")
    assert "launchkit plan MODEL" in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "12", "[" * 100_000, '{"kind": "plan"}', "\x00"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanFileError, match=r"^x\.json (is not|has) .*; write one with"):
        plan_from_text(text, name="x.json")


def test_numbers_that_json_lacks_are_never_written() -> None:
    broken = plans.candidate(step=replace(plans.candidate().step, mfu=float("nan")))
    with pytest.raises(ValueError, match="not JSON compliant"):
        document_text(candidate_document(broken, cluster=plans.CLUSTER))


def test_scenario_settings_survive_without_a_cluster_change() -> None:
    plan = _every_setting_changed()
    assert plan.chosen is not None
    back = plan_from_document(plan_document(plan))
    assert back.chosen is not None
    assert isinstance(back.chosen.scenario, Scenario)
    assert back.chosen.scenario.strategy == plan.chosen.scenario.strategy
