"""Traps in configuration files of accelerate, DeepSpeed, Axolotl and TRL: what they ignore, contradict or refuse later.

Accelerate checks only its top-level keys, DeepSpeed only the section ``zero_optimization``, Axolotl none; the rest of a
typing slip has no effect and no message. A finding says where, what, and what to write instead.
"""

from __future__ import annotations

from enum import StrEnum

from launchkit.export import known_keys
from launchkit.export.lint import accelerate, axolotl, deepspeed, trl
from launchkit.export.lint.findings import Check, Config, Finding, Severity
from launchkit.hardware import Cluster

__all__ = ["Finding", "Severity", "Tool", "lint", "lint_accelerate", "lint_axolotl", "lint_deepspeed", "tool_of"]


class Tool(StrEnum):
    ACCELERATE = "accelerate"
    DEEPSPEED = "deepspeed"
    AXOLOTL = "axolotl"
    TRL = "trl"

    @property
    def called(self) -> str:
        """The tool's name as its people write it."""
        return {"deepspeed": "DeepSpeed", "axolotl": "Axolotl", "trl": "TRL"}.get(self.value, self.value)


_CHECKS: dict[Tool, tuple[Check, ...]] = {
    Tool.ACCELERATE: accelerate.CHECKS,
    Tool.DEEPSPEED: deepspeed.CHECKS,
    Tool.AXOLOTL: axolotl.CHECKS,
    Tool.TRL: trl.CHECKS,
}
_TOP_LEVEL_KEYS = {
    Tool.ACCELERATE: known_keys.ACCELERATE,
    Tool.DEEPSPEED: known_keys.DEEPSPEED,
    Tool.AXOLOTL: known_keys.AXOLOTL,
    Tool.TRL: known_keys.TRL | known_keys.TRL_LAUNCH,
}


def tool_of(config: Config) -> Tool | None:
    """Whose file this is, told by the keys that only that tool has; None where nothing tells."""
    for key, tool in (
        ("base_model", Tool.AXOLOTL),
        ("model_name_or_path", Tool.TRL),
        ("distributed_type", Tool.ACCELERATE),
        ("zero_optimization", Tool.DEEPSPEED),
    ):
        if key in config:
            return tool
    known = {tool: len(keys & set(config)) for tool, keys in _TOP_LEVEL_KEYS.items()}
    best = max(known, key=lambda tool: known[tool])
    return best if known[best] else None


def lint(config: Config, *, tool: Tool, cluster: Cluster | None = None) -> tuple[Finding, ...]:
    """Every finding, errors first; ``cluster`` adds what can only be judged knowing the GPUs."""
    findings = [finding for check in _CHECKS[tool] for finding in check(config)]
    if tool is Tool.ACCELERATE and cluster is not None:
        findings += accelerate.against_cluster(config, cluster)
    return tuple(sorted(findings, key=lambda finding: finding.severity is not Severity.ERROR))


def lint_accelerate(config: Config, *, cluster: Cluster | None = None) -> tuple[Finding, ...]:
    """Findings in the YAML of ``accelerate launch --config_file``."""
    return lint(config, tool=Tool.ACCELERATE, cluster=cluster)


def lint_deepspeed(config: Config) -> tuple[Finding, ...]:
    """Findings in DeepSpeed's JSON."""
    return lint(config, tool=Tool.DEEPSPEED)


def lint_axolotl(config: Config) -> tuple[Finding, ...]:
    """Findings in the YAML of ``axolotl train``."""
    return lint(config, tool=Tool.AXOLOTL)
