"""Every trap has a file that falls into it, and one that just does not."""

from __future__ import annotations

from typing import Any

import pytest

from launchkit.export.lint import Severity, Tool, lint, lint_accelerate, lint_deepspeed, tool_of
from tests.builders import cluster

FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "fsdp_reshard_after_forward": True,
}
FSDP1 = {
    "fsdp_version": 1,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_sharding_strategy": "SHARD_GRAD_OP",
}
UNSHARDED = {"distributed_type": "MULTI_GPU", "fsdp_config": None}
BASES: dict[Tool, dict[str, Any]] = {
    Tool.ACCELERATE: {"distributed_type": "FSDP", "mixed_precision": "bf16", "num_processes": 4, "fsdp_config": FSDP2},
    Tool.DEEPSPEED: {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000_000}},
    Tool.AXOLOTL: {
        "base_model": "org/model",
        "datasets": [{"path": "data.jsonl", "ds_type": "json", "type": "chat_template"}],
        "learning_rate": 0.0002,
        "optimizer": "adamw_torch_fused",
        "adapter": "lora",
        "lora_r": 16,
        "lora_target_linear": True,
        "bf16": True,
        "gradient_checkpointing": False,
        "fsdp_version": 2,
        "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "activation_checkpointing": True},
    },
    Tool.TRL: {
        "model_name_or_path": "org/model",
        "dataset_name": "org/data",
        "use_peft": True,
        "lora_r": 16,
        "attn_implementation": "flash_attention_2",
        "packing": True,
        "num_processes": 4,
        "accelerate_config": "fsdp2",
    },
}
DEEPSPEED_YAML = {"distributed_type": "DEEPSPEED", "mixed_precision": None, "fsdp_config": None}
ZERO3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}

# tool, what is written over the base (None removes), the path of the finding, a part of its text
TRAPS: list[tuple[Tool, dict[str, Any], str, str]] = [
    (Tool.TRL, {"max_seq_length": 2048}, "max_seq_length", "accelerate launch, which refuses it"),
    (Tool.TRL, {"bf16": True, "fp16": True}, "bf16", "keep one of them"),
    (Tool.TRL, {"use_peft": None, "load_in_4bit": True}, "use_peft", "quantised weights do not train"),
    (Tool.TRL, {"use_peft": False}, "lora_r", "does nothing without use_peft"),
    (Tool.TRL, {"attn_implementation": None}, "packing", "write attn_implementation: flash_attention_2"),
    (
        Tool.TRL,
        {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        "gradient_checkpointing_kwargs",
        "remove it",
    ),
    (Tool.ACCELERATE, {"num_process": 4}, "num_process", "write num_processes"),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP2 | {"fsdp_offload_param": True}},
        "fsdp_config.fsdp_offload_param",
        "params",
    ),
    (Tool.ACCELERATE, {"distributed_type": None}, "distributed_type", "is missing"),
    (Tool.ACCELERATE, {"distributed_type": "DDP", "fsdp_config": None}, "distributed_type", "'DDP' is not a choice"),
    (Tool.ACCELERATE, {"mixed_precision": "bfloat16"}, "mixed_precision", "bf16"),
    (Tool.ACCELERATE, {"num_machines": 3}, "num_processes", "total over 3 machines"),
    (Tool.ACCELERATE, {"use_cpu": True}, "use_cpu", "turns FSDP into DDP"),
    (Tool.ACCELERATE, {"distributed_type": "MULTI_CPU", "fsdp_config": None}, "distributed_type", "one process, not 4"),
    (Tool.ACCELERATE, {"distributed_type": "MULTI_GPU"}, "fsdp_config", "does nothing with"),
    (Tool.ACCELERATE, {"fsdp_config": {"fsdp_version": 2}}, "fsdp_config.fsdp_auto_wrap_policy", "one unit"),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP2 | {"fsdp_transformer_layer_cls_to_wrap": "A, B"}},
        "fsdp_config.fsdp_transformer_layer_cls_to_wrap",
        "space",
    ),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP1 | {"fsdp_reshard_after_forward": "SHARD_GRAD_OP"}},
        "fsdp_config.fsdp_reshard_after_forward",
        "ignored by FSDP1",
    ),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP1 | {"fsdp_sync_module_states": False}},
        "fsdp_config.fsdp_sync_module_states",
        "must be true",
    ),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP2 | {"fsdp_sharding_strategy": "FULL_SHARD"}},
        "fsdp_config.fsdp_sharding_strategy",
        "belongs to FSDP1",
    ),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP2 | {"fsdp_reshard_after_forward": "FULL_SHARD"}},
        "fsdp_config.fsdp_reshard_after_forward",
        "true or false",
    ),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP2 | {"fsdp_state_dict_type": "LOCAL_STATE_DICT"}},
        "fsdp_config.state_dict_type",
        "not a choice",
    ),
    (
        Tool.ACCELERATE,
        DEEPSPEED_YAML | {"mixed_precision": "bf16", "deepspeed_config": {"deepspeed_config_file": "z.json"}},
        "mixed_precision",
        "refused beside",
    ),
    (
        Tool.ACCELERATE,
        DEEPSPEED_YAML | {"deepspeed_config": {"deepspeed_config_file": "z.json", "zero_stage": 3}},
        "deepspeed_config.zero_stage",
        "refused beside",
    ),
    (
        Tool.ACCELERATE,
        DEEPSPEED_YAML | {"deepspeed_config": {"zero_stage": 2, "offload_optimizer_device": "nvme"}},
        "deepspeed_config.offload_optimizer_device",
        "loses its path",
    ),
    (
        Tool.ACCELERATE,
        DEEPSPEED_YAML | {"deepspeed_config": {"zero_stage": 3}},
        "deepspeed_config.zero3_save_16bit_model",
        "no weights",
    ),
    (Tool.ACCELERATE, {"parallelism_config": {"tp_size": 2}}, "parallelism_config.tp_size", "would be ignored"),
    (
        Tool.ACCELERATE,
        {"parallelism_config": {"parallelism_config_dp_replicate_size": 2}},
        "parallelism_config",
        "mesh of 2, with num_processes 4",
    ),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP1, "parallelism_config": {"parallelism_config_dp_shard_size": 4}},
        "parallelism_config",
        "needs FSDP2",
    ),
    (
        Tool.ACCELERATE,
        {"mixed_precision": "fp8", "fp8_config": {"backend": "TE", "amax_history_length": 16}},
        "fp8_config.amax_history_length",
        "write amax_history_len",
    ),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP2, "mixed_precision": "fp8", "fp8_config": {"backend": "TE"}},
        "fp8_config.backend",
        "never turns its 8 bits on",
    ),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP1, "mixed_precision": "fp8", "fp8_config": {"backend": "TE"}},
        "fp8_config.backend",
        "hands over apart under FSDP1",
    ),
    (
        Tool.ACCELERATE,
        {**UNSHARDED, "mixed_precision": "fp8", "fp8_config": {"backend": "TE", "use_mxfp8_block_scaling": True}},
        "fp8_config.use_mxfp8_block_scaling",
        "delayed scaling is counted",
    ),
    (
        Tool.ACCELERATE,
        {**UNSHARDED, "mixed_precision": "fp8", "fp8_config": {"backend": "TE", "interval": 2}},
        "fp8_config.interval",
        "no longer has",
    ),
    (Tool.ACCELERATE, {"mixed_precision": "fp8", "fp8_config": {"backend": "MSAMP"}}, "fp8_config.backend", "MS-AMP"),
    (
        Tool.ACCELERATE,
        {"mixed_precision": "fp8", "fp8_config": {"backend": "A0"}},
        "fp8_config.backend",
        "not a choice",
    ),
    (
        Tool.ACCELERATE,
        {
            "distributed_type": "MULTI_GPU",
            "fsdp_config": None,
            "mixed_precision": "fp8",
            "fp8_config": {"backend": "AO"},
        },
        "fp8_config.enable_fsdp_float8_all_gather",
        "parameters that the optimizer does not have",
    ),
    (
        Tool.ACCELERATE,
        {"distributed_type": "NO", "num_processes": 1, "fsdp_config": None, "mixed_precision": "fp8"},
        "fp8_config.enable_fsdp_float8_all_gather",
        "write false",
    ),
    (
        Tool.ACCELERATE,
        {"fsdp_config": FSDP2, "mixed_precision": "fp8", "fp8_config": {"backend": "AO"}},
        "fsdp_config.fsdp_cpu_ram_efficient_loading",
        "is refused with torchao's fp8",
    ),
    (Tool.DEEPSPEED, {"gradient_acumulation_steps": 4}, "gradient_acumulation_steps", "write gradient_accumulation"),
    (
        Tool.DEEPSPEED,
        {"zero_optimization": {"stage": 2, "reduce_bucket": 5}},
        "zero_optimization.reduce_bucket",
        "would be refused",
    ),
    (Tool.DEEPSPEED, {"amp": {"enabled": True}}, "amp", "was removed"),
    (Tool.DEEPSPEED, {"fp16": {"enabled": True}}, "bf16.enabled", "together with fp16"),
    (
        Tool.DEEPSPEED,
        {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
        "bf16.bf16_optimizer_states",
        "needs bf16_master_weights_and_grads",
    ),
    (
        Tool.DEEPSPEED,
        {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
        "train_batch_size",
        "no multiple",
    ),
    (
        Tool.DEEPSPEED,
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "zero_optimization.offload_param",
        "does nothing in stage 2",
    ),
    (
        Tool.DEEPSPEED,
        {"zero_optimization": ZERO3 | {"offload_param": {"device": "nvme"}}},
        "zero_optimization.offload_param.nvme_path",
        "is missing",
    ),
    (
        Tool.DEEPSPEED,
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
        "zero_optimization.offload_optimizer.device",
        "needs stage 3",
    ),
    (
        Tool.DEEPSPEED,
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "zero_optimization.offload_optimizer.ratio",
        "needs stage 3",
    ),
    (
        Tool.DEEPSPEED,
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "zero_force_ds_cpu_optimizer",
        "swaps the script's optimizer",
    ),
    (
        Tool.DEEPSPEED,
        {"zero_optimization": {"stage": 3}},
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "no weights",
    ),
    (
        Tool.DEEPSPEED,
        {"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}},
        "zero_optimization.allgather_bucket_size",
        "nothing fills",
    ),
    (
        Tool.AXOLOTL,
        {"fp8": True, "adapter": None, "fsdp_config": {"cpu_ram_efficient_loading": True}},
        "fsdp_config.cpu_ram_efficient_loading",
        "is refused with fp8",
    ),
    (
        Tool.AXOLOTL,
        {"fp8": True, "adapter": None, "fsdp_config": None, "fp8_enable_fsdp_float8_all_gather": True},
        "fp8_enable_fsdp_float8_all_gather",
        "parameters that the optimizer does not have",
    ),
    (Tool.AXOLOTL, {"fp8": True}, "fp8", "converts the frozen layers of lora too"),
    (Tool.AXOLOTL, {"fp8": True, "deepspeed": "z.json", "fsdp_config": None}, "fp8", "does not go with DeepSpeed"),
    (Tool.AXOLOTL, {"micro_batchsize": 2}, "micro_batchsize", "write micro_batch_size"),
    (Tool.AXOLOTL, {"fsdp_config": {"offload_param": True}}, "fsdp_config.offload_param", "write fsdp_offload_params"),
    (Tool.AXOLOTL, {"fsdp_config": {"fsdp_offload_params": True}}, "fsdp_config.fsdp_offload_params", "prefix"),
    (Tool.AXOLOTL, {"datasets": None}, "datasets", "is missing"),
    (Tool.AXOLOTL, {"datasets": [{"path": "x", "tpye": "alpaca"}]}, "datasets[0].tpye", "write type"),
    (Tool.AXOLOTL, {"datasets": [{"path": "x", "type": "sharegpt"}]}, "datasets[0].type", "was removed"),
    (Tool.AXOLOTL, {"learning_rate": None}, "learning_rate", "is missing"),
    (Tool.AXOLOTL, {"deepspeed": "z.json"}, "deepspeed", "FSDP wins"),
    (Tool.AXOLOTL, {"fp16": True}, "bf16", "one of them"),
    (Tool.AXOLOTL, {"save_steps": 10, "saves_per_epoch": 1}, "save_steps", "one schedule"),
    (Tool.AXOLOTL, {"adapter": None, "load_in_4bit": True}, "adapter", "is missing"),
    (Tool.AXOLOTL, {"adapter": "qlora"}, "load_in_4bit", "is off under qlora"),
    (Tool.AXOLOTL, {"load_in_4bit": True}, "adapter", "write qlora"),
    (Tool.AXOLOTL, {"lora_target_linear": False}, "lora_target_modules", "no layer gets"),
    (Tool.AXOLOTL, {"attn_implementation": "flash"}, "attn_implementation", "write flash_attention_2"),
    (Tool.AXOLOTL, {"attn_implementation": "flashy"}, "attn_implementation", "not a choice"),
    (Tool.AXOLOTL, {"optimizer": "adamw_9bit"}, "optimizer", "write adamw_8bit"),
    (Tool.AXOLOTL, {"sample_packing": True, "attn_implementation": None}, "sample_packing", "see each other"),
    (Tool.AXOLOTL, {"fsdp_version": None}, "fsdp_version", "means version 1"),
    (Tool.AXOLOTL, {"load_in_8bit": True}, "load_in_8bit", "does not shard"),
    (Tool.AXOLOTL, {"gradient_checkpointing": True}, "gradient_checkpointing", "once more"),
    (Tool.AXOLOTL, {"optimizer": "adamw_bnb_8bit"}, "optimizer", "write adamw_torch_8bit"),
    (
        Tool.AXOLOTL,
        {"adapter": "qlora", "load_in_4bit": True, "fsdp_config": {"cpu_ram_efficient_loading": True}},
        "fsdp_config.cpu_ram_efficient_loading",
        "hangs",
    ),
    (Tool.AXOLOTL, {"fsdp_version": 1, "optimizer": "muon"}, "optimizer", "write fsdp_version: 2"),
    (
        Tool.AXOLOTL,
        {"fsdp_config": None, "fsdp_version": None, "deepspeed": "z.json", "optimizer": "muon"},
        "optimizer",
        "refused with DeepSpeed",
    ),
    (Tool.AXOLOTL, {"fsdp_config": None, "dp_shard_size": 2}, "dp_shard_size", "without fsdp_config"),
    (Tool.AXOLOTL, {"gradient_checkpointing": "unsloth"}, "gradient_checkpointing", "was removed"),
    (
        Tool.AXOLOTL,
        {"fsdp_config": None, "gradient_checkpointing": True},
        "gradient_checkpointing_kwargs.use_reentrant",
        "true unless written",
    ),
]

# What stands close to a trap and is none.
CLEAN: list[tuple[Tool, dict[str, Any]]] = [
    *((tool, {}) for tool in Tool),
    (Tool.ACCELERATE, {"fsdp_config": FSDP1}),
    (Tool.ACCELERATE, {"fsdp_config": {key.removeprefix("fsdp_"): value for key, value in FSDP2.items()}}),
    (Tool.ACCELERATE, DEEPSPEED_YAML | {"deepspeed_config": {"zero_stage": 3, "zero3_save_16bit_model": True}}),
    (
        Tool.DEEPSPEED,
        {"gradient_clipping": "auto", "train_batch_size": "auto", "optimizer": {"params": {"lr": "auto"}}},
    ),
    (Tool.DEEPSPEED, {"zero_optimization": ZERO3 | {"prefetch_bucket_size": 5, "stage3_max_live_parameters": 5}}),
    (Tool.AXOLOTL, {"attn_implementation": "kernels-community/flash-attn3", "sample_packing": True}),
    (Tool.AXOLOTL, {"attn_implementation": None, "sdp_attention": True, "sample_packing": True}),
    (Tool.AXOLOTL, {"attn_implementation": "sdpa", "sample_packing": True}),
    (Tool.AXOLOTL, {"plugins": ["some.plugin"], "key_of_some_plugin": 1}),
    (Tool.AXOLOTL, {"bf16": "auto", "fp16": None, "model_type": "AutoModelForCausalLM"}),
]


def over(tool: Tool, changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (BASES[tool] | changes).items() if value is not None}


@pytest.mark.parametrize(("tool", "changes", "path", "part"), TRAPS, ids=lambda value: str(value)[:60])
def test_a_trap_is_found_where_it_is(tool: Tool, changes: dict[str, Any], path: str, part: str) -> None:
    findings = lint(over(tool, changes), tool=tool)
    assert any(finding.path == path and part in finding.text for finding in findings), [each.text for each in findings]


@pytest.mark.parametrize(("tool", "changes"), CLEAN, ids=lambda value: str(value)[:60])
def test_a_sound_file_has_no_finding(tool: Tool, changes: dict[str, Any]) -> None:
    assert [finding.text for finding in lint(over(tool, changes), tool=tool)] == []


@pytest.mark.parametrize("tool", Tool)
def test_the_tool_of_a_file_is_told_by_its_keys(tool: Tool) -> None:
    assert tool_of(BASES[tool]) is tool
    assert tool_of({"nothing": 1}) is None


def test_more_processes_than_gpus_are_found_only_where_the_gpus_are_known() -> None:
    config = over(Tool.ACCELERATE, {"num_processes": 8})
    assert lint_accelerate(config) == ()
    assert [each.path for each in lint_accelerate(config, cluster=cluster(num_gpus=4))] == ["num_processes"]


def test_errors_stand_before_warnings() -> None:
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "unheard_of": 1}
    findings = lint_deepspeed({"zero_optimization": offload, "gradient_clipping": 1.0, "zzz": 1})
    assert [each.severity for each in findings] == [Severity.ERROR, Severity.ERROR, Severity.WARNING]


@pytest.mark.parametrize("config", [{}, {"fsdp_config": None}, {"zero_optimization": []}, {"datasets": "x"}])
@pytest.mark.parametrize("tool", Tool)
def test_a_malformed_file_does_not_crash_the_lint(tool: Tool, config: dict[str, Any]) -> None:
    assert isinstance(lint(config, tool=tool), tuple)
