"""A change of a scenario as edits of a file, in its tool's own keys; of other files and the script where it must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launchkit.errors import IllegalScenarioError
from launchkit.export.edits import Edit, edits
from launchkit.export.lint import Tool
from launchkit.plan import Candidate
from tests.builders import candidate, cluster

BASE: dict[str, Any] = {"micro_batch": 2, "gradient_accumulation_steps": 4, "seq_len": 4096, "strategy": "ddp"}


def made(tool: Tool, before: dict[str, Any], after: dict[str, Any], config: dict[str, Any] | None = None) -> list[str]:
    one, other = candidate(**(BASE | before)), candidate(**(BASE | before | after))
    found = edits(one, other, cluster=cluster(), tool=tool, config=config or {})
    return [f"{edit.part}: {edit.text}" if edit.part else edit.text for edit in found]


AXOLOTL = {"trainer": "axolotl", "precision": "bf16-params"}
# tool, the scenario of the file, what changes, the edits
TABLE: list[tuple[Tool, dict[str, Any], dict[str, Any], list[str]]] = [
    (Tool.AXOLOTL, AXOLOTL, {"seq_len": 2048}, ["sequence_len: 2048"]),
    (
        Tool.AXOLOTL,
        AXOLOTL,
        {"micro_batch": 1, "gradient_accumulation_steps": 8},
        ["micro_batch_size: 1", "gradient_accumulation_steps: 8"],
    ),
    (
        Tool.AXOLOTL,
        AXOLOTL,
        {"checkpointing": "full"},
        ["gradient_checkpointing: true", "gradient_checkpointing_kwargs: {use_reentrant: false}"],
    ),
    (
        Tool.AXOLOTL,
        {"trainer": "axolotl", "strategy": "fsdp2"},
        {"checkpointing": "full"},
        ["fsdp_config.activation_checkpointing: true"],
    ),
    (Tool.AXOLOTL, AXOLOTL | {"method": "lora"}, {"method": "qlora"}, ["adapter: qlora", "load_in_4bit: true"]),
    (
        Tool.AXOLOTL,
        AXOLOTL,
        {"loss": "liger"},
        ["plugins: [axolotl.integrations.liger.LigerPlugin]", "liger_fused_linear_cross_entropy: true"],
    ),
    (Tool.AXOLOTL, AXOLOTL, {"optimizer": "adamw_bnb_8bit"}, ["optimizer: adamw_bnb_8bit"]),
    (
        Tool.AXOLOTL,
        {"trainer": "axolotl", "strategy": "zero2"},
        {"strategy": "zero3"},
        ["DeepSpeed's file: zero_optimization.stage: 3"],
    ),
    (
        Tool.TRL,
        {"trainer": "trl", "loss": "chunked", "strategy": "fsdp2"},
        {"checkpointing": "full"},
        ["accelerate's file: fsdp_config.fsdp_activation_checkpointing: true"],
    ),
    (Tool.TRL, {"trainer": "trl", "loss": "chunked"}, {"seq_len": 512}, ["max_length: 512"]),
    (
        Tool.ACCELERATE,
        {"strategy": "fsdp2"},
        {"offload": "params"},
        ["fsdp_config.fsdp_offload_params: true"],
    ),
    (
        Tool.ACCELERATE,
        {},
        {"micro_batch": 1, "gradient_accumulation_steps": 8},
        ["the script: per_device_train_batch_size: 1", "the script: gradient_accumulation_steps: 8"],
    ),
    (
        Tool.DEEPSPEED,
        {"strategy": "zero2"},
        {"offload": "optimizer"},
        ["zero_optimization.offload_optimizer: {device: cpu, pin_memory: true}"],
    ),
    (Tool.DEEPSPEED, {"strategy": "zero2"}, {"strategy": "zero3"}, ["zero_optimization.stage: 3"]),
]


@pytest.mark.parametrize(("tool", "before", "after", "expected"), TABLE, ids=lambda value: str(value)[:45])
def test_a_change_in_the_tools_own_words(
    tool: Tool, before: dict[str, Any], after: dict[str, Any], expected: list[str]
) -> None:
    assert made(tool, before, after) == expected


@pytest.mark.parametrize("tool", Tool)
def test_no_change_is_no_edit(tool: Tool) -> None:
    values = {"strategy": "zero2", "loss": "chunked" if tool is Tool.TRL else "plain"}
    assert made(tool, values, {}) == []


def test_what_the_file_has_already_is_not_said() -> None:
    config = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert made(Tool.AXOLOTL, AXOLOTL, {"checkpointing": "full"}, config) == ["gradient_checkpointing: true"]


def test_other_plugins_stay() -> None:
    found = made(Tool.AXOLOTL, AXOLOTL, {"loss": "liger"}, {"plugins": ["some.plugin"]})
    assert found[0] == "plugins: [some.plugin, axolotl.integrations.liger.LigerPlugin]"


def test_accelerates_own_keys_of_zero_are_used_where_it_names_no_file() -> None:
    config = {"deepspeed_config": {"zero_stage": 2}}
    assert made(Tool.ACCELERATE, {"strategy": "zero2"}, {"strategy": "zero3"}, config) == [
        "deepspeed_config.zero3_init_flag: true",
        "deepspeed_config.zero_stage: 3",
    ]
    assert "deepspeed_config.offload_optimizer_device: cpu" in made(
        Tool.ACCELERATE, {"strategy": "zero2"}, {"offload": "optimizer"}, config
    )


def test_keys_that_no_longer_belong_are_taken_out_where_they_are() -> None:
    before, after = AXOLOTL | {"method": "lora"}, {"method": "full"}
    removed = [
        text for text in made(Tool.AXOLOTL, before, after, {"adapter": "lora", "lora_r": 16}) if "remove" in text
    ]
    assert removed == ["remove adapter", "remove lora_r"]


def test_what_a_tool_cannot_be_told_is_refused_unless_the_file_says_it_already() -> None:
    with pytest.raises(IllegalScenarioError, match="bf16-params with FSDP2"):
        made(Tool.AXOLOTL, AXOLOTL, {"strategy": "fsdp2"})
    pure = AXOLOTL | {"precision": "bf16-pure"}  # which Axolotl does otherwise
    assert made(Tool.AXOLOTL, pure, {"seq_len": 2048}) == ["sequence_len: 2048"]


def test_values_are_written_as_yaml_on_one_line() -> None:
    assert Edit(path="a", value=[1, {"b": None}]).text == "a: [1, {b: null}]"
    assert Edit(path="a", value="x: y").text == "a: 'x: y'"
    assert Edit(path="a", value=0.5).text == "a: 0.5"
    assert Edit(path="a.b", value=None).text == "remove a.b"


def test_a_candidate_is_not_altered() -> None:
    one = candidate(**BASE)
    copy: Candidate = replace(one)
    edits(one, candidate(**(BASE | {"seq_len": 128})), cluster=cluster(), tool=Tool.AXOLOTL, config={})
    assert one == copy
