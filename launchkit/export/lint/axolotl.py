"""Traps in Axolotl's YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from launchkit.export import known_keys
from launchkit.export.lint.findings import (
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

_ATTENTION_NAMES = {"flash": "flash_attention_2", "sdp": "sdpa", "flex": "flex_attention"}
_ATTENTIONS = (
    *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flash_attention_torch"),
    *("flex_attention", "xformers", "sage", "fp8"),
)
_EXCLUSIVE_IN_AXOLOTL = (
    ("deepspeed", "fsdp_config", "FSDP wins and DeepSpeed is dropped"),
    ("deepspeed", "fsdp", "they are two engines"),
    ("bf16", "fp16", "a run has one of them"),
    ("load_in_4bit", "load_in_8bit", "weights have one format"),
    ("batch_size", "gradient_accumulation_steps", "one follows from the other"),
    ("save_steps", "saves_per_epoch", "saving has one schedule"),
    ("eval_steps", "evals_per_epoch", "evaluation has one schedule"),
    ("warmup_steps", "warmup_ratio", "warm-up has one length"),
    ("val_set_size", "test_datasets", "evaluation has one source"),
    ("max_memory", "gpu_memory_limit", "memory has one limit"),
)


def _keys(config: Config) -> Findings:
    # A plugin adds keys of its own, and only Axolotl's two of the loss are known here.
    plugins = config.get("plugins")
    names = [str(name) for name in plugins] if isinstance(plugins, list) else []
    has_other_plugins = any("liger" not in name and "cut_cross" not in name for name in names)
    for finding in unknown_keys(config, known_keys.AXOLOTL):
        if not has_other_plugins:
            yield finding
    prefixed = [str(key) for key in section_of(config, "fsdp_config") if str(key).startswith("fsdp_")]
    old = [key for key in prefixed if key != "fsdp_version" and key.removeprefix("fsdp_") in known_keys.AXOLOTL_FSDP]
    if old:
        others = f", and so have {len(old) - 1} more" if len(old) > 1 else ""
        yield Finding(
            path=f"fsdp_config.{old[0]}",
            problem=f"has a prefix, which is deprecated{others}",
            fix=f"write {old[0].removeprefix('fsdp_')}",
            severity=Severity.WARNING,
        )
    yield from unknown_keys(config.get("fsdp_config"), known_keys.AXOLOTL_FSDP, path="fsdp_config.", prefix="fsdp_")


def _data(config: Config) -> Findings:
    datasets = config.get("datasets")
    if not datasets and not config.get("pretraining_dataset"):
        yield Finding(path="datasets", problem="is missing", fix="write a list of {path, type}")
    for index, dataset in enumerate(datasets if isinstance(datasets, list) else ()):
        path = f"datasets[{index}]"
        yield from unknown_keys(dataset, known_keys.AXOLOTL_DATASET, path=f"{path}.")
        if isinstance(dataset, Mapping) and str(dataset.get("type", "")).startswith("sharegpt"):
            fix = "write chat_template, field_messages: conversations and message_property_mappings"
            yield Finding(path=f"{path}.type", problem="sharegpt was removed", fix=fix)
    if "learning_rate" not in config:
        yield Finding(path="learning_rate", problem="is missing", fix="write for instance 0.0002")


def _exclusive(config: Config) -> Findings:
    for first, second, why in _EXCLUSIVE_IN_AXOLOTL:
        if config.get(first) and config.get(second) and config[first] != "auto":
            yield Finding(path=first, problem=f"stands beside {second}, and {why}", fix="keep one of them")


def _adapter(config: Config) -> Findings:
    adapter, is_4bit, is_8bit = config.get("adapter"), config.get("load_in_4bit"), config.get("load_in_8bit")
    if not adapter and (is_4bit or is_8bit):
        yield Finding(path="adapter", problem="is missing, and quantised weights do not train", fix="write qlora")
    if adapter == "qlora" and not is_4bit:
        yield Finding(path="load_in_4bit", problem="is off under qlora", fix="write true")
    if adapter == "lora" and is_4bit:
        yield Finding(path="adapter", problem="is lora with 4-bit weights", fix="write qlora")
    has_targets = any(
        config.get(key) for key in ("lora_target_linear", "lora_target_modules", "lora_target_parameters")
    )
    if adapter in ("lora", "qlora") and not has_targets and not config.get("lora_model_dir"):
        problem = "is missing, and no layer gets an adapter"
        yield Finding(path="lora_target_modules", problem=problem, fix="write lora_target_linear: true")


def _names(config: Config) -> Findings:
    attention = str(config.get("attn_implementation") or "sdpa")
    if attention in _ATTENTION_NAMES:
        problem = f"{attention!r} is refused"
        yield Finding(path="attn_implementation", problem=problem, fix=f"write {_ATTENTION_NAMES[attention]}")
    elif attention not in _ATTENTIONS and "/" not in attention:
        yield from choice(config, "attn_implementation", _ATTENTIONS)
    optimizer = str(config.get("optimizer") or "adamw_torch_fused")
    if optimizer not in known_keys.AXOLOTL_OPTIMIZERS:
        similar = difflib.get_close_matches(optimizer, known_keys.AXOLOTL_OPTIMIZERS, n=1) or ["adamw_torch_fused"]
        yield Finding(path="optimizer", problem=f"{optimizer!r} is no optimizer", fix=f"write {similar[0]}")
    names_attention = config.get("attn_implementation") or any(config.get(key) for key in known_keys.AXOLOTL_ATTENTIONS)
    if config.get("sample_packing") and not names_attention:
        problem = "lets packed sequences see each other where no attention is named"
        yield Finding(path="sample_packing", problem=problem, fix="write attn_implementation: flash_attention_2")


def _fsdp(config: Config) -> Findings:
    section = section_of(config, "fsdp_config")
    if not section:
        if config.get("dp_shard_size", 1) not in (None, 1):
            yield Finding(path="dp_shard_size", problem="does nothing without fsdp_config", fix="write fsdp_config")
        return
    fsdp = {str(key).removeprefix("fsdp_"): value for key, value in section.items()}
    version = config.get("fsdp_version") or fsdp.get("version")
    if version is None:
        yield Finding(
            path="fsdp_version",
            problem="is missing and means version 1",
            fix="write fsdp_version: 2",
            severity=Severity.WARNING,
        )
    if config.get("load_in_8bit"):
        yield Finding(
            path="load_in_8bit", problem="does not shard under FSDP", fix="write load_in_4bit and adapter: qlora"
        )
    if is_true(fsdp.get("activation_checkpointing")) and config.get("gradient_checkpointing"):
        problem = "stands beside fsdp_config.activation_checkpointing, and gathers every block once more"
        yield Finding(path="gradient_checkpointing", problem=problem, fix="write false")
    optimizer = str(config.get("optimizer"))
    if str(version) == "2":
        yield from _fsdp2(config, fsdp)
    elif optimizer == "muon" or ("8bit" in optimizer and is_true(fsdp.get("offload_params"))):
        yield Finding(path="optimizer", problem=f"{optimizer} is refused here", fix="write fsdp_version: 2")


def _fsdp2(config: Config, fsdp: Config) -> Findings:
    if config.get("optimizer") in ("adamw_8bit", "adamw_bnb_8bit"):
        problem = f"{config['optimizer']} is refused with FSDP2"
        yield Finding(path="optimizer", problem=problem, fix="write adamw_torch_8bit")
    if config.get("load_in_4bit") and is_true(fsdp.get("cpu_ram_efficient_loading")):
        problem = "hangs with 4-bit weights, which only rank 0 would quantise"
        yield Finding(path="fsdp_config.cpu_ram_efficient_loading", problem=problem, fix="write false")


def _fp8(config: Config) -> Findings:
    """Source: Axolotl's ``additional_accelerator_args``; accelerate 1.15 ``Accelerator.__init__``."""
    if not is_true(config.get("fp8")):
        return
    fsdp = {str(key).removeprefix("fsdp_"): value for key, value in section_of(config, "fsdp_config").items()}
    if fsdp and is_true(fsdp.get("cpu_ram_efficient_loading")):
        problem = "is refused with fp8 by accelerate"
        yield Finding(path="fsdp_config.cpu_ram_efficient_loading", problem=problem, fix="write false")
    if not fsdp and is_true(config.get("fp8_enable_fsdp_float8_all_gather")):
        problem = "gives the layers parameters that the optimizer does not have where nothing is sharded"
        yield Finding(path="fp8_enable_fsdp_float8_all_gather", problem=problem, fix="remove it")
    if config.get("deepspeed"):
        yield Finding(path="fp8", problem="does not go with DeepSpeed", fix="write fsdp_config with version 2")
    if config.get("adapter"):
        problem = f"converts the frozen layers of {config['adapter']} too, whose gradients are made and dropped"
        yield Finding(path="fp8", problem=problem, fix="remove it", severity=Severity.WARNING)


def _deepspeed(config: Config) -> Findings:
    if config.get("deepspeed") and config.get("optimizer") == "muon":
        yield Finding(
            path="optimizer", problem="muon is refused with DeepSpeed", fix="write fsdp_config with version 2"
        )


def _checkpointing(config: Config) -> Findings:
    checkpointing = config.get("gradient_checkpointing")
    if checkpointing in ("offload", "offload_disk", "unsloth"):
        fix = "write true, and activation_offloading: true"
        yield Finding(path="gradient_checkpointing", problem=f"{checkpointing!r} was removed", fix=fix)
    elif checkpointing and "use_reentrant" not in section_of(config, "gradient_checkpointing_kwargs"):
        yield Finding(
            path="gradient_checkpointing_kwargs.use_reentrant",
            problem="is true unless written",
            fix="write false",
            severity=Severity.WARNING,
        )


CHECKS: tuple[Check, ...] = (
    _keys,
    _data,
    _exclusive,
    _adapter,
    _names,
    _fsdp,
    _fp8,
    _deepspeed,
    _checkpointing,
)
