"""Files that a tool brings along and that people name without having them.

Sources: axolotl-ai-cloud/axolotl ``deepspeed_configs/`` (July 2026), trl 1.16 ``trl/accelerate_configs/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_AUTO = {
    name: "auto"
    for name in (
        *("train_batch_size", "train_micro_batch_size_per_gpu"),
        *("gradient_accumulation_steps", "gradient_clipping"),
    )
}
_EITHER: dict[str, Any] = _AUTO | {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
_BF16: dict[str, Any] = _AUTO | {"bf16": {"enabled": True}}
_CPU = {"device": "cpu", "pin_memory": True}
_ZERO1 = {"stage": 1, "overlap_comm": True}
_ZERO2 = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "contiguous_gradients": True, "overlap_comm": True}
_ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 0,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "max_live_parameters": 0,
    "max_reuse_distance": 0,
    "gather_16bit_weights_on_model_save": True,
}
AXOLOTL_DEEPSPEED: Mapping[str, Mapping[str, Any]] = {
    "zero1.json": _EITHER | {"zero_optimization": _ZERO1},
    "zero1_torch_compile.json": _EITHER | {"zero_optimization": _ZERO1},
    "zero2.json": _EITHER | {"zero_optimization": _ZERO2},
    "zero2_torch_compile.json": _EITHER | {"zero_optimization": _ZERO2},
    "zero3.json": _EITHER | {"zero_optimization": _ZERO3},
    "zero3_bf16.json": _BF16 | {"zero_optimization": _ZERO3},
    "zero3_bf16_cpuoffload_all.json": _BF16
    | {"zero_optimization": _ZERO3 | {"offload_optimizer": _CPU, "offload_param": _CPU}},
    "zero3_bf16_cpuoffload_params.json": _BF16 | {"zero_optimization": _ZERO3 | {"offload_param": _CPU}},
}


def _trl(kind: str, num_processes: int = 8, **sections: Any) -> dict[str, Any]:
    return {"distributed_type": kind, "mixed_precision": "bf16", "num_processes": num_processes, **sections}


_FSDP = {
    "fsdp_activation_checkpointing": False,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_offload_params": False,
}
TRL_ACCELERATE: Mapping[str, Mapping[str, Any]] = {
    "single_gpu": _trl("NO", 1),
    "multi_gpu": _trl("MULTI_GPU"),
    "fsdp1": _trl(
        "FSDP",
        fsdp_config=_FSDP
        | {
            "fsdp_version": 1,
            "fsdp_sharding_strategy": "FULL_SHARD",
            "fsdp_backward_prefetch": "BACKWARD_PRE",
            "fsdp_forward_prefetch": True,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
        },
    ),
    "fsdp2": _trl(
        "FSDP",
        fsdp_config=_FSDP
        | {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_state_dict_type": "FULL_STATE_DICT"},
    ),
    "zero1": _trl("DEEPSPEED", deepspeed_config={"zero_stage": 1}),
    "zero2": _trl("DEEPSPEED", deepspeed_config={"zero_stage": 2}),
    "zero3": _trl("DEEPSPEED", deepspeed_config={"zero_stage": 3, "zero3_save_16bit_model": True}),
}
