"""TRL's YAML, for ``trl sft --config``; beside accelerate's, which says how the job is spread."""

from __future__ import annotations

from launchkit.errors import IllegalScenarioError
from launchkit.export.layout import (
    OUTPUT_DIRECTORY,
    adapter_parts,
    adapter_sizes,
    autocast_format,
    check_expressible,
    checkpointing_arguments,
    clip_norm,
    ddp_arguments,
    lora_target_modules,
)
from launchkit.hardware import Backend, Cluster
from launchkit.optimizers import find
from launchkit.plan import Candidate
from launchkit.recipe import RECIPES
from launchkit.scenario import UNSHARDED, Checkpointing, Loss, Method, Precision, StrategyKind, Training

DEFAULT_DATASET = "train"  # a directory of data files, or a hub id
_BF16_WEIGHTS = (Precision.BF16_PARAMS, Precision.BF16_PURE)


def trl_config(
    candidate: Candidate, cluster: Cluster, *, model: str | None = None, data: str = DEFAULT_DATASET
) -> dict[str, object]:
    """``SFTConfig``, ``ModelConfig`` and ``ScriptArguments`` in one file. Strategy keys live in accelerate's file."""
    check_expressible(candidate, cluster)
    check_trl(candidate)
    return trl_keys(candidate, cluster, model=model, data=data)


def trl_keys(
    candidate: Candidate, cluster: Cluster, *, model: str | None = None, data: str = DEFAULT_DATASET
) -> dict[str, object]:
    """``trl_config`` without its checks."""
    training, batch = candidate.scenario.training, candidate.scenario.batch
    autocast = autocast_format(candidate.scenario)
    return {
        "model_name_or_path": model or candidate.model.name,
        "dataset_name": data,
        "output_dir": OUTPUT_DIRECTORY,
        "dtype": _weights_dtype(candidate),
        "attn_implementation": training.attention.value,
        "max_length": batch.seq_len,
        "packing": training.packing,
        "per_device_train_batch_size": batch.micro_batch,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        **find(training.optimizer).trainer_arguments,
        "learning_rate": RECIPES[training.method].learning_rate,
        "max_grad_norm": clip_norm(candidate),
        "bf16": autocast == "bf16",
        "fp16": autocast == "fp16",
        "tf32": cluster.gpu.tf32_flops_per_s > 0,
        "use_cpu": cluster.gpu.backend is Backend.CPU,
        "use_liger_kernel": training.loss is Loss.LIGER,
        "torch_compile": training.compile,
        **_checkpointing(candidate),
        **_padding(training),
        **_adapter(candidate),
        **ddp_arguments(candidate),
        **_static_graph(candidate),
    }


def _static_graph(candidate: Candidate) -> dict[str, object]:
    """A setting of DDP's that the Trainer has had for a short time, told only where it is on."""
    strategy = candidate.scenario.strategy
    is_static = strategy.kind is StrategyKind.DDP and strategy.ddp.static_graph
    return {"ddp_static_graph": True} if is_static else {}


def _weights_dtype(candidate: Candidate) -> str:
    """fp32 is held in the weights themselves unless an engine keeps it elsewhere (FSDP's shards, ZeRO's master) or
    the weights are frozen and quantised."""
    scenario = candidate.scenario
    is_unsharded = scenario.strategy.kind in UNSHARDED
    if scenario.training.precision is Precision.FP32:
        return "float32"
    if scenario.training.precision in _BF16_WEIGHTS:
        return "bfloat16"
    if is_unsharded and scenario.training.method is not Method.QLORA:
        return "float32"
    return "float16" if scenario.training.precision is Precision.FP16 else "bfloat16"


def _padding(training: Training) -> dict[str, object]:
    """Transformer Engine stops at a batch of another number of tokens."""
    return {"pad_to_multiple_of": 16} if training.uses_transformer_engine else {}


def _checkpointing(candidate: Candidate) -> dict[str, object]:
    scenario = candidate.scenario
    if scenario.training.checkpointing is Checkpointing.NONE or scenario.strategy.kind.is_fsdp:
        return {"gradient_checkpointing": False}
    kwargs = checkpointing_arguments(candidate)
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}


def _adapter(candidate: Candidate) -> dict[str, object]:
    training = candidate.scenario.training
    if training.method is Method.FULL:
        return {}
    return {
        "use_peft": True,
        **adapter_sizes(training),
        "lora_target_modules": list(lora_target_modules(candidate)),
        **adapter_parts(training),
        **({"use_dora": True} if training.dora else {}),
        **({"use_rslora": True} if training.rslora else {}),
    }


def check_trl(candidate: Candidate) -> None:
    """Raises ``IllegalScenarioError`` for what TRL has not, or computes otherwise."""
    training, task = candidate.scenario.training, candidate.model.task
    if training.loss is Loss.CCE:
        raise IllegalScenarioError("TRL has no cut cross-entropy; use --loss liger, or leave TRL out")
    if training.freeze:
        raise IllegalScenarioError("trl sft has no key for --freeze; leave TRL out")
    if split := candidate.scenario.strategy.split.text:
        raise IllegalScenarioError(f"trl sft computes another loss than was planned with {split}; leave TRL out")
    if not find(training.optimizer).trainer_arguments:
        raise IllegalScenarioError(f"TRL has no {training.optimizer}; use --optimizer adamw_torch, or leave TRL out")
    if task != "causal-lm":
        raise IllegalScenarioError(f"trl sft is not for {task}; use --trainer hf, or leave TRL out")
