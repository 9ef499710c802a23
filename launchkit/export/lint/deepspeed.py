"""Traps in DeepSpeed's JSON."""

from __future__ import annotations

from collections.abc import Mapping

from launchkit.export import known_keys
from launchkit.export.lint.findings import (
    IGNORED,
    REFUSED,
    Check,
    Config,
    Finding,
    Findings,
    Severity,
    choice,
    is_true,
    section_of,
    unknown_keys,
)

_REMOVED_FROM_DEEPSPEED = ("amp", "compression_training", "nebula", "quantize_training")
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# "auto" that the Hugging Face Trainer fills. Source: transformers 5.23, integrations/deepspeed.py.
_AUTO_PATHS = frozenset(
    (
        *_BATCH_KEYS,
        *("gradient_clipping", "bf16.enabled", "fp16.enabled"),
        *(f"optimizer.params.{key}" for key in ("lr", "betas", "eps", "weight_decay")),
        *(f"scheduler.params.{key}" for key in ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")),
        *("scheduler.params.total_num_steps", "zero_optimization.reduce_bucket_size"),
        *(f"zero_optimization.stage3_{key}" for key in ("prefetch_bucket_size", "param_persistence_threshold")),
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",  # filled by accelerate
    )
)


def _keys(config: Config) -> Findings:
    zero = section_of(config, "zero_optimization")
    for section, known, path in (
        (config, known_keys.DEEPSPEED | set(_REMOVED_FROM_DEEPSPEED), ""),
        (zero, known_keys.DEEPSPEED_ZERO, "zero_optimization."),
        (config.get("bf16"), known_keys.DEEPSPEED_BF16, "bf16."),
        (config.get("fp16"), known_keys.DEEPSPEED_FP16, "fp16."),
        (zero.get("offload_optimizer"), known_keys.DEEPSPEED_OFFLOAD_OPTIMIZER, "zero_optimization.offload_optimizer."),
        (zero.get("offload_param"), known_keys.DEEPSPEED_OFFLOAD_PARAM, "zero_optimization.offload_param."),
    ):
        # DeepSpeed checks each section, and not the top level.
        yield from unknown_keys(section, known, path=path, effect=REFUSED if path else IGNORED)
    for key in _REMOVED_FROM_DEEPSPEED:
        if key in config:
            yield Finding(path=key, problem="was removed from DeepSpeed", fix="remove it")


def _precision(config: Config) -> Findings:
    if all(is_true(section_of(config, name).get("enabled")) for name in ("bf16", "fp16")):
        yield Finding(path="bf16.enabled", problem="is on together with fp16", fix="keep one of them")
    bf16 = section_of(config, "bf16")
    if is_true(bf16.get("bf16_optimizer_states")) and not is_true(bf16.get("bf16_master_weights_and_grads")):
        problem = "needs bf16_master_weights_and_grads"
        yield Finding(path="bf16.bf16_optimizer_states", problem=problem, fix="write both true")


def _batch(config: Config) -> Findings:
    sizes = [config.get(key) for key in _BATCH_KEYS]
    total, micro, accumulation = sizes
    if not (isinstance(total, int) and isinstance(micro, int) and isinstance(accumulation, int)):
        return
    if micro * accumulation == 0 or total % (micro * accumulation):
        problem = f"{total} is no multiple of micro-batch {micro} × accumulation {accumulation}"
        yield Finding(path="train_batch_size", problem=problem, fix="write micro-batch × accumulation × GPUs")


def _offload(config: Config) -> Findings:
    zero = section_of(config, "zero_optimization")
    stage = zero.get("stage", 0)
    for name in ("offload_optimizer", "offload_param"):
        section, path = section_of(zero, name), f"zero_optimization.{name}"
        device = section.get("device", "none")
        yield from choice(section, f"{path}.device", ("none", "cpu", "nvme"))
        if device == "nvme" and not section.get("nvme_path"):
            yield Finding(path=f"{path}.nvme_path", problem="is missing", fix="write a directory on the disk")
        if device == "nvme" and stage != 3:
            yield Finding(
                path=f"{path}.device", problem=f"nvme needs stage 3, not {stage}", fix="write cpu, or stage 3"
            )
    if section_of(zero, "offload_param").get("device", "none") != "none" and stage != 3:
        problem = f"does nothing in stage {stage}"
        yield Finding(path="zero_optimization.offload_param", problem=problem, fix="write stage 3, or remove it")
    if section_of(zero, "offload_optimizer").get("ratio", 1.0) != 1.0 and stage != 3:
        problem = f"below 1 needs stage 3, not {stage}"
        yield Finding(path="zero_optimization.offload_optimizer.ratio", problem=problem, fix="remove it")


def _saving(config: Config) -> Findings:
    zero = section_of(config, "zero_optimization")
    names = ("stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save")
    if zero.get("stage") == 3 and not any(is_true(zero.get(name)) or zero.get(name) == "auto" for name in names):
        problem = "is off, so checkpoints hold no weights that from_pretrained can read"
        yield Finding(path=f"zero_optimization.{names[0]}", problem=problem, fix="write true")


def _optimizer(config: Config) -> Findings:
    offload = section_of(section_of(config, "zero_optimization"), "offload_optimizer").get("device", "none")
    if offload != "none" and "optimizer" not in config and "zero_force_ds_cpu_optimizer" not in config:
        problem = "is on unless written, and swaps the script's optimizer for DeepSpeedCPUAdam under accelerate"
        yield Finding(
            path="zero_force_ds_cpu_optimizer", problem=problem, fix="write true or false", severity=Severity.WARNING
        )


def _auto(config: Config, *, path: str = "") -> Findings:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _auto(value, path=f"{path}{key}.")
        elif value == "auto" and f"{path}{key}" not in _AUTO_PATHS:
            yield Finding(path=f"{path}{key}", problem='is "auto", which nothing fills', fix="write a value")


CHECKS: tuple[Check, ...] = (
    _keys,
    _precision,
    _batch,
    _offload,
    _saving,
    _optimizer,
    _auto,
)
