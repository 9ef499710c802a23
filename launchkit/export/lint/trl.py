"""Traps in TRL's YAML. Source: trl 1.16 ``SFTConfig``, ``SFTTrainer``, ``cli/commands/training.py``."""

from __future__ import annotations

from launchkit.export import known_keys
from launchkit.export.lint.findings import (
    Check,
    Config,
    Finding,
    Findings,
    Severity,
    is_true,
    section_of,
    unknown_keys,
)

_UNPACKING_ATTENTIONS = ("eager", "sdpa")
_PASSED_ON = "is passed on to accelerate launch, which refuses it"


def _keys(config: Config) -> Findings:
    for finding in unknown_keys(config, known_keys.TRL | known_keys.TRL_LAUNCH):
        yield Finding(path=finding.path, problem=_PASSED_ON, fix=finding.fix)


def _precision(config: Config) -> Findings:
    if is_true(config.get("bf16")) and is_true(config.get("fp16")):
        yield Finding(path="bf16", problem="stands beside fp16, and a run has one of them", fix="keep one of them")


def _adapter(config: Config) -> Findings:
    is_quantised = is_true(config.get("load_in_4bit")) or is_true(config.get("load_in_8bit"))
    if is_quantised and not is_true(config.get("use_peft")):
        yield Finding(path="use_peft", problem="is off, and quantised weights do not train", fix="write true")
    if not is_true(config.get("use_peft")) and config.get("lora_r") is not None:
        yield Finding(path="lora_r", problem="does nothing without use_peft", fix="write use_peft: true")


def _packing(config: Config) -> Findings:
    attention = str(config.get("attn_implementation") or "sdpa")
    if is_true(config.get("packing")) and attention in _UNPACKING_ATTENTIONS:
        problem = f"makes one long row, and {attention} masks tokens by tokens in it"
        fix = "write attn_implementation: flash_attention_2"
        yield Finding(path="packing", problem=problem, fix=fix, severity=Severity.WARNING)


def _checkpointing(config: Config) -> Findings:
    is_off = config.get("gradient_checkpointing") is False
    if is_off and section_of(config, "gradient_checkpointing_kwargs"):
        problem, fix = "does nothing with gradient_checkpointing: false", "remove it"
        yield Finding(path="gradient_checkpointing_kwargs", problem=problem, fix=fix, severity=Severity.WARNING)


CHECKS: tuple[Check, ...] = (_keys, _precision, _adapter, _packing, _checkpointing)
