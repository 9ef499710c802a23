"""From one scenario to another as edits of a file, in its tool's own keys: the exporters write both, and what differs
is the edit. So no key is spelled anywhere but where it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from launchkit.errors import IllegalScenarioError
from launchkit.export.accelerate import accelerate_keys
from launchkit.export.axolotl import axolotl_keys, check_axolotl
from launchkit.export.deepspeed import deepspeed_keys
from launchkit.export.layout import check_expressible
from launchkit.export.lint import Tool
from launchkit.export.trl import check_trl, trl_keys
from launchkit.hardware import Cluster
from launchkit.plan import Candidate

_ACCELERATE_PART = "accelerate's file"
_DEEPSPEED_PART = "DeepSpeed's file"
_SCRIPT_PART = "the script"
_Keys = Callable[[Candidate, Cluster], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One key to write; None as the value takes it out. ``part`` is what holds it where that is not the file itself:
    another file that it goes with, or the script, by the names of ``TrainingArguments``."""

    path: str
    value: Any
    part: str = ""

    @property
    def text(self) -> str:
        """``gradient_checkpointing: true``, as YAML has it on one line."""
        if self.value is None:
            return f"remove {self.path}"
        value = yaml.safe_dump(self.value, default_flow_style=True, sort_keys=False, width=10_000)
        return f"{self.path}: {value.removesuffix('...').strip().removesuffix('...').strip()}"


def edits(
    before: Candidate, after: Candidate, *, cluster: Cluster, tool: Tool, config: Mapping[str, Any]
) -> tuple[Edit, ...]:
    """What to change in ``config``, a file of ``tool``, to make ``before`` into ``after``.

    Raises ``IllegalScenarioError`` where the tool cannot be told, unless it cannot be told ``before`` for the same
    reason.
    """
    _check(before, after, cluster=cluster, tool=tool)
    found = []
    for part, keys in _parts(tool, after, config=config):
        own = config if not part else {}
        has_old = keys not in (_main_zero_keys, _accelerates_zero_keys) or before.scenario.strategy.kind.zero_stage
        old = keys(before, cluster) if has_old else {}
        found += list(_differences(old, keys(after, cluster), own=own, part=part))
    return tuple(found)


def _parts(tool: Tool, after: Candidate, *, config: Mapping[str, Any]) -> tuple[tuple[str, _Keys], ...]:
    """The files that a tool reads, its own first, and for the script what only that says."""
    zero: tuple[tuple[str, _Keys], ...] = ()
    if after.scenario.strategy.kind.zero_stage:
        zero = ((_DEEPSPEED_PART, _main_zero_keys),)
        section = config.get("deepspeed_config")
        if tool is Tool.ACCELERATE and isinstance(section, Mapping) and "deepspeed_config_file" not in section:
            zero = (("", _accelerates_zero_keys),)
    return {
        Tool.AXOLOTL: (("", axolotl_keys), *zero),
        Tool.TRL: (("", trl_keys), (_ACCELERATE_PART, accelerate_keys), *zero),
        Tool.ACCELERATE: (("", accelerate_keys), (_SCRIPT_PART, _script_keys), *zero),
        Tool.DEEPSPEED: (("", _main_zero_keys), (_SCRIPT_PART, _script_keys)),
    }[tool]


def _main_zero_keys(candidate: Candidate, cluster: Cluster) -> Mapping[str, Any]:
    """Stage and offload: buffers keep the sizes that the file gives them."""
    config = deepspeed_keys(candidate, cluster, auto=True)
    zero: Any = config["zero_optimization"]
    kept = ("stage", "offload_optimizer", "offload_param")
    return {"zero_optimization": {key: value for key, value in zero.items() if key in kept}}


def _accelerates_zero_keys(candidate: Candidate, cluster: Cluster) -> Mapping[str, Any]:
    """The same in accelerate's own words, for a file that names none of DeepSpeed's."""
    zero = _main_zero_keys(candidate, cluster)["zero_optimization"]
    devices = {
        f"{kind}_device": zero[kind]["device"] for kind in ("offload_optimizer", "offload_param") if kind in zero
    }
    return {"deepspeed_config": {"zero_stage": zero["stage"], **devices}}


# What a script says that accelerate's and DeepSpeed's files do not: arguments of the Trainer, of PEFT and of loading.
_NOT_THE_SCRIPTS = ("model_name_or_path", "dataset_name", "output_dir", "use_peft", "tf32", "use_cpu")


def _script_keys(candidate: Candidate, cluster: Cluster) -> Mapping[str, Any]:
    return {key: value for key, value in trl_keys(candidate, cluster).items() if key not in _NOT_THE_SCRIPTS}


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, own: object, part: str, path: str = ""
) -> Iterator[Edit]:
    """Keys of ``new`` that are not in ``old`` so, and those that are gone; ``own`` is what the file has there."""
    has = own if isinstance(own, Mapping) else {}
    for key, value in new.items():
        if value == old.get(key) or value == has.get(key):
            continue
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping):
            yield from _differences(old[key], value, own=has.get(key), part=part, path=f"{path}{key}.")
        else:
            yield Edit(path=f"{path}{key}", value=_joined(has.get(key), value), part=part)
    for key in _gone(old, new, has=has, part=part):
        yield Edit(path=f"{path}{key}", value=None, part=part)


def _gone(old: Mapping[str, Any], new: Mapping[str, Any], *, has: Mapping[str, Any], part: str) -> list[str]:
    """Keys that no longer belong: of the file itself only those that it has."""
    return [key for key in old if key not in new and (part or key in has)]


def _joined(own: object, value: Any) -> Any:
    """A list in addition to what stands there: a plugin beside the others."""
    if isinstance(own, list) and isinstance(value, list):
        return [*own, *(item for item in value if item not in own)]
    return value


def _check(before: Candidate, after: Candidate, *, cluster: Cluster, tool: Tool) -> None:
    checks: tuple[Callable[[Candidate], None], ...] = (lambda candidate: check_expressible(candidate, cluster),)
    if tool is Tool.AXOLOTL:
        checks += (lambda candidate: check_axolotl(candidate, cluster),)
    if tool is Tool.TRL:
        checks += (check_trl,)
    for check in checks:
        refusal = _refusal(check, after)
        if refusal and refusal != _refusal(check, before):
            raise IllegalScenarioError(refusal)


def _refusal(check: Callable[[Candidate], None], candidate: Candidate) -> str:
    try:
        check(candidate)
    except IllegalScenarioError as error:
        return str(error)
    return ""
