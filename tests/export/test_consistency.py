"""The files written for one plan agree with it and with each other, whatever the plan."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launchkit.errors import IllegalScenarioError, UsageError
from launchkit.export import Target, config_files
from launchkit.export.lint import lint_accelerate, lint_axolotl, lint_deepspeed
from launchkit.plan import Candidate
from launchkit.scenario import (
    Attention,
    Checkpointing,
    Loss,
    Method,
    Offload,
    Precision,
    Sharding,
    StrategyKind,
    Trainer,
)
from tests.builders import candidate, cluster, plan
from tests.export.cases import Case, axolotl_cases, case, strategy_cases

SCENARIOS = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(StrategyKind),
        "offload": st.sampled_from(Offload),
        "sharding": st.sampled_from(Sharding),
        "method": st.sampled_from(Method),
        "lora_rank": st.sampled_from([4, 16, 64]),
        "lora_targets": st.sampled_from(["all-linear", "attention", "q_proj,v_proj"]),
        "precision": st.sampled_from(Precision),
        "optimizer": st.sampled_from(["adamw_torch_fused", "adamw_torch_8bit", "paged_adamw_8bit", "adafactor"]),
        "checkpointing": st.sampled_from(Checkpointing),
        "attention": st.sampled_from(Attention),
        "loss": st.sampled_from(Loss),
        "trainer": st.sampled_from(Trainer),
        "packing": st.booleans(),
        "compile": st.booleans(),
        "micro_batch": st.integers(1, 64),
        "gradient_accumulation_steps": st.integers(1, 256),
        "seq_len": st.integers(1, 131_072),
        "reduce_bucket_size": st.integers(1, 10**9),
        "stage3_max_live_parameters": st.integers(0, 10**10),
        "max_grad_norm": st.floats(0.1, 10.0),
    }
)
CLUSTERS = st.builds(
    cluster,
    num_gpus=st.sampled_from([1, 2, 4, 8]),
    num_nodes=st.integers(1, 4),
    backend=st.sampled_from(["cuda", "cpu"]),
)


def configs_of(planned: Candidate, cluster: Any) -> dict[str, Any]:
    """Every file that can be written, parsed again; a target that refuses is left out."""
    parsed = {}
    for target in Target:
        try:
            files = config_files(planned, cluster, targets=(target,))
        except IllegalScenarioError:
            continue
        for file in files:
            parsed[file.name] = json.loads(file.text) if file.name.endswith(".json") else yaml.safe_load(file.text)
    return parsed


@given(SCENARIOS, CLUSTERS)
def test_files_agree_with_the_plan(values: dict[str, Any], cluster: Any) -> None:
    planned = candidate(**values)
    configs = configs_of(planned, cluster)
    batch, kind = planned.scenario.batch, planned.scenario.strategy.kind
    processes = 1 if kind is StrategyKind.SINGLE else cluster.num_gpus
    if accelerate := configs.get("accelerate.yaml"):
        assert accelerate["num_processes"] == processes
    if axolotl := configs.get("axolotl.yaml"):
        assert axolotl["micro_batch_size"] == batch.micro_batch
        assert axolotl["gradient_accumulation_steps"] == batch.gradient_accumulation_steps
        assert axolotl["sequence_len"] == batch.seq_len
        assert axolotl.get("lora_r", values["lora_rank"]) == values["lora_rank"]
    if trl := configs.get("trl.yaml"):
        assert trl["per_device_train_batch_size"] == batch.micro_batch
        assert trl["gradient_accumulation_steps"] == batch.gradient_accumulation_steps
    if deepspeed := configs.get("deepspeed.json"):
        assert deepspeed["zero_optimization"]["stage"] == kind.zero_stage
        assert deepspeed["zero_optimization"]["reduce_bucket_size"] == values["reduce_bucket_size"]
        total = deepspeed["train_batch_size"]
        is_loop = planned.scenario.training.trainer is Trainer.LOOP
        assert total == (batch.global_batch(processes) if is_loop else "auto")


@given(SCENARIOS, CLUSTERS)
def test_files_agree_with_each_other(values: dict[str, Any], cluster: Any) -> None:
    configs = configs_of(candidate(**values), cluster)
    deepspeed, accelerate = configs.get("deepspeed.json"), configs.get("accelerate.yaml")
    trainers = [configs[name] for name in ("axolotl.yaml", "trl.yaml") if name in configs]
    if deepspeed is not None and accelerate is not None:
        assert accelerate["deepspeed_config"]["deepspeed_config_file"] == "deepspeed.json"
        assert "mixed_precision" not in accelerate
    for trainer in trainers:
        if deepspeed is not None:
            # A trainer whose precision or clipping differs from DeepSpeed's file stops at start.
            assert trainer["bf16"] == deepspeed.get("bf16", {}).get("enabled", False)
            assert trainer["fp16"] == deepspeed.get("fp16", {}).get("enabled", False)
            assert deepspeed["gradient_clipping"] in ("auto", trainer["max_grad_norm"])
        elif accelerate is not None and accelerate["mixed_precision"] != "fp8":
            assert trainer["bf16"] == (accelerate["mixed_precision"] == "bf16")
            assert trainer["fp16"] == (accelerate["mixed_precision"] == "fp16")
    if "axolotl.yaml" in configs and accelerate is not None and "fsdp_config" in accelerate:
        ours, theirs = accelerate["fsdp_config"], configs["axolotl.yaml"]["fsdp_config"]
        shared = {f"fsdp_{key}" for key in theirs} & set(ours)
        assert {key: ours[key] for key in shared} == {key: theirs[key.removeprefix("fsdp_")] for key in shared}
        assert {"fsdp_offload_params", "fsdp_transformer_layer_cls_to_wrap"} <= shared


@pytest.mark.parametrize("loss", list(Loss))
def test_the_keys_of_every_loss_are_known(loss: Loss) -> None:
    config = configs_of(candidate(loss=loss), cluster())["axolotl.yaml"]
    assert [finding.text for finding in lint_axolotl(config)] == []


@given(SCENARIOS, CLUSTERS)
def test_no_file_of_ours_has_a_finding(values: dict[str, Any], cluster: Any) -> None:
    configs = configs_of(candidate(**values), cluster)
    findings = [
        *lint_accelerate(configs.get("accelerate.yaml", {"distributed_type": "NO"}), cluster=cluster),
        *lint_deepspeed(configs.get("deepspeed.json", {})),
        *(lint_axolotl(configs["axolotl.yaml"]) if "axolotl.yaml" in configs else ()),
    ]
    assert [finding.text for finding in findings] == []


def test_every_strategy_is_written_for_every_target() -> None:
    """So that the properties above are not true of nothing."""
    for each in strategy_cases():
        expected = {"accelerate.yaml", "axolotl.yaml", "trl.yaml"}
        expected |= {"deepspeed.json"} if each.candidate.scenario.strategy.kind.zero_stage else set()
        assert set(configs_of(each.candidate, each.cluster)) == expected, each.name


@pytest.mark.parametrize("each", axolotl_cases(), ids=lambda each: each.name)
def test_the_same_arguments_give_the_same_bytes(each: Case) -> None:
    try:
        first = config_files(each.candidate, each.cluster)
    except IllegalScenarioError:
        with pytest.raises(IllegalScenarioError):
            config_files(each.candidate, each.cluster)
        return
    assert first == config_files(each.candidate, each.cluster)


def test_a_plan_is_written_as_its_chosen_candidate() -> None:
    chosen = candidate(strategy="zero3")
    assert config_files(plan(chosen=chosen), cluster()) == config_files(chosen, cluster())


INVALID = [
    ({"strategy": "ddp", "offload": "optimizer"}, "offloads nothing"),
    ({"strategy": "fsdp2", "offload": "optimizer"}, "together"),
    ({"strategy": "zero2", "offload": "params"}, "would be ignored"),
    ({"strategy": "fsdp2", "sharding": "no_shard"}, "always shards"),
    ({"strategy": "fsdp2", "sharding": "hybrid_shard"}, "--strategy hsdp"),
    ({"strategy": "hsdp", "shard_group_size": 4}, "equal shard groups"),
    ({"strategy": "hsdp", "shard_group_size": 3}, "equal shard groups"),
    ({"strategy": "fsdp", "limit_all_gathers": False}, "limit_all_gathers"),
    ({"strategy": "zero3", "precision": "fp8"}, "no fp8"),
    ({"strategy": "fsdp", "precision": "fp8"}, "this fp8"),
    ({"strategy": "fsdp2", "precision": "fp8", "offload": "params"}, "this fp8"),
    ({"strategy": "ddp", "precision": "fp8", "method": "lora"}, "full fine-tunes"),
    ({"strategy": "ddp", "precision": "fp8", "backend": "cpu"}, "for GPUs"),
    ({"strategy": "zero3", "precision": "bf16-pure", "offload": "optimizer"}, "optimizer states on the host"),
]


@pytest.mark.parametrize(("values", "part"), INVALID, ids=lambda value: str(value))
def test_what_no_file_can_say_is_refused_in_one_line(values: dict[str, Any], part: str) -> None:
    each = case("invalid", **values)
    with pytest.raises(IllegalScenarioError, match=part) as refusal:
        config_files(each.candidate, each.cluster)
    assert "; " in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_plan_that_chose_nothing_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="nothing fits; plan again"):
        config_files(plan(fits=False), cluster())


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'horovod'; choose from accelerate, deepspeed, axolotl, trl"):
        config_files(candidate(), cluster(), targets=("horovod",))


@pytest.mark.parametrize(
    ("strategy", "num_gpus", "is_set"), [("single", 1, False), ("ddp", 2, True), ("zero2", 2, False), ("ddp", 1, False)]
)
def test_only_ddp_on_cpu_is_run_with_accelerates_cpu_switch(strategy: str, num_gpus: int, is_set: bool) -> None:
    each = case("cpu", strategy=strategy, num_gpus=num_gpus, backend="cpu", precision="fp32")
    file = config_files(each.candidate, each.cluster, targets=("accelerate",))[0]
    assert ("ACCELERATE_USE_CPU=true" in file.text) == is_set
    assert ("PartialState(cpu=True)" in file.text) == (strategy == "zero2")
