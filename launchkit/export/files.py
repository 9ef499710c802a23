"""From a plan to the texts of its configuration files. Writing them is the command line's part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import yaml

from launchkit.alloc_conf import EXPANDABLE, VARIABLE
from launchkit.errors import IllegalScenarioError, UsageError
from launchkit.export.accelerate import accelerate_config
from launchkit.export.axolotl import DEFAULT_DATA, axolotl_config, axolotl_notes
from launchkit.export.deepspeed import deepspeed_config
from launchkit.export.layout import (
    DEEPSPEED_FILE,
    ddp_advice,
    distributed_config,
    num_data_ranks,
    num_nodes,
    num_processes,
)
from launchkit.export.trl import trl_config
from launchkit.hardware import Backend, Cluster
from launchkit.plan import Candidate, Plan
from launchkit.scenario import Method, Trainer
from launchkit.units import gib

ACCELERATE_FILE = "accelerate.yaml"
AXOLOTL_FILE = "axolotl.yaml"
TRL_FILE = "trl.yaml"


class Target(StrEnum):
    """A tool that files are written for."""

    ACCELERATE = "accelerate"
    DEEPSPEED = "deepspeed"
    AXOLOTL = "axolotl"
    TRL = "trl"


DEFAULT_TARGETS = (Target.ACCELERATE, Target.DEEPSPEED, Target.AXOLOTL)


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A file to be written: its name, without a directory, and its text."""

    name: str
    text: str


def config_files(
    planned: Plan | Candidate,
    cluster: Cluster,
    *,
    targets: tuple[str, ...] = DEFAULT_TARGETS,
    model: str | None = None,
    data: str | Mapping[str, object] = DEFAULT_DATA,
    cpu_adam_builds: bool = False,
) -> tuple[ConfigFile, ...]:
    """The files that make each tool of ``targets`` run what was planned; the same arguments give the same bytes.

    DeepSpeed's file comes along wherever a ZeRO strategy is referred to, and not at all otherwise. Its name is
    relative: the tools look for it in the directory they are started from. ``model`` and ``data`` are for Axolotl
    and TRL (see ``axolotl_config``). Raises ``IllegalScenarioError`` for what a target cannot be told.
    """
    candidate = _chosen(planned)
    wanted = _targets(targets)
    files = []
    if Target.ACCELERATE in wanted or Target.TRL in wanted:
        files.append(_accelerate_file(candidate, cluster))
    if candidate.scenario.strategy.kind.zero_stage:
        files.append(_deepspeed_file(candidate, cluster, cpu_adam_builds=cpu_adam_builds))
    if Target.AXOLOTL in wanted:
        config = axolotl_config(candidate, cluster, model=model, data=data)
        prefix = "" if candidate.scenario.alloc_conf == EXPANDABLE else _allocator_prefix(candidate)  # it says that
        comments = (f"Run: {prefix}axolotl train {AXOLOTL_FILE}", *axolotl_notes(candidate))
        files.append(_yaml_file(AXOLOTL_FILE, config, header=_header(candidate, cluster, *comments)))
    if Target.TRL in wanted:
        dataset = str(data["path"]) if isinstance(data, Mapping) else data
        run = _allocator_prefix(candidate)
        comments = (f"Run: {run}trl sft --config {TRL_FILE} --accelerate_config {ACCELERATE_FILE}",)
        text = trl_config(candidate, cluster, model=model, data=dataset)
        files.append(_yaml_file(TRL_FILE, text, header=_header(candidate, cluster, *comments)))
    return tuple(files)


def expressible_files(
    planned: Plan | Candidate, cluster: Cluster, *, model: str | None = None, data: str = DEFAULT_DATA
) -> tuple[tuple[ConfigFile, ...], tuple[str, ...]]:
    """The files of those default targets that can be told what was planned, and why the others cannot.

    Raises ``IllegalScenarioError`` where none can.
    """
    candidate = _chosen(planned)
    files: dict[str, ConfigFile] = {}
    reasons: list[str] = []
    for target in DEFAULT_TARGETS:
        try:
            of_target = config_files(candidate, cluster, targets=(target,), model=model, data=data)
        except IllegalScenarioError as error:
            reasons.append(str(error))
        else:
            files |= {file.name: file for file in of_target}
    if reasons and not files:
        raise IllegalScenarioError(reasons[0])
    return tuple(files.values()), tuple(dict.fromkeys(reasons))


def _chosen(planned: Plan | Candidate) -> Candidate:
    if isinstance(planned, Candidate):
        return planned
    if planned.chosen is None:
        raise UsageError(
            f"the plan for {planned.model.name} chose nothing, since nothing fits; "
            "plan again with more GPUs, a shorter --seq-len, or --method qlora"
        )
    return planned.chosen


def _targets(names: tuple[str, ...]) -> frozenset[Target]:
    unknown = sorted(set(names) - set(Target))
    if unknown:
        raise UsageError(f"no files are known for {unknown[0]!r}; choose from {', '.join(Target)}")
    return frozenset(Target(name) for name in names)


def _accelerate_file(candidate: Candidate, cluster: Cluster) -> ConfigFile:
    run = f"accelerate launch --config_file {ACCELERATE_FILE}"
    if num_nodes(candidate, cluster) > 1:
        run += " --machine_rank <this node, from 0> --main_process_ip <address of node 0>"
    prefix, *advice = _cpu_advice(candidate, cluster)
    batch = candidate.scenario.batch
    comments = (
        f"Run: {_allocator_prefix(candidate)}{prefix}{run} train.py",
        f"The script itself sets micro-batch {batch.micro_batch} and "
        f"{batch.gradient_accumulation_steps} accumulation steps.",
        *advice,
        *_split_advice(candidate, cluster),
        *((f"The script itself sets {advice_for_ddp}.",) if (advice_for_ddp := ddp_advice(candidate)) else ()),
    )
    return _yaml_file(
        ACCELERATE_FILE, accelerate_config(candidate, cluster), header=_header(candidate, cluster, *comments)
    )


def _allocator_prefix(candidate: Candidate) -> str:
    """What to put before a command for torch's allocator to be as planned."""
    conf = candidate.scenario.alloc_conf
    return f"{VARIABLE}={conf} " if conf else ""


def _cpu_advice(candidate: Candidate, cluster: Cluster) -> tuple[str, ...]:
    """What to put before the command, then comments: several processes on CPU need help that a YAML cannot give.

    The launcher passes ``use_cpu`` on to a single process only. In the environment it makes DDP work, and turns
    ZeRO into DDP without a word; ZeRO needs the process group to exist instead. Seen with accelerate 1.15.0.
    """
    if cluster.gpu.backend is not Backend.CPU or num_processes(candidate, cluster) == 1:
        return ("",)
    if candidate.scenario.strategy.kind.zero_stage:
        return "", "It calls PartialState(cpu=True) before Accelerator(), or passes TrainingArguments use_cpu=True."
    return ("ACCELERATE_USE_CPU=true ",)


# PEFT 0.21 with transformers 5.23; the built-in fine-tune does both.
_ADAPTER_ADVICE = (
    "It calls launchkit.finetune.split_adapters.declare_whole_widths on what get_peft_model returns, without which",
    "adapters on matrices split by rows (o_proj, down_proj) fail in the first forward pass.",
)


_SAVING_ADVICE = ("Its TrainingArguments say save_only_model=True: the Trainer does not resume a split model.",)


def _split_advice(candidate: Candidate, cluster: Cluster) -> tuple[str, ...]:
    """What the script has to do itself where ranks share a step: accelerate is only told of it."""
    parts = distributed_config(candidate, cluster)
    if parts:
        arguments = ", ".join(f"{name}={value}" for name, value in parts.items())
        training = candidate.scenario.training
        return (
            f"It loads the model with from_pretrained(..., distributed_config=DistributedConfig({arguments})).",
            *(_ADAPTER_ADVICE if training.method is not Method.FULL else ()),
            *(_SAVING_ADVICE if training.trainer is not Trainer.LOOP else ()),
        )
    if candidate.scenario.strategy.split.num_ranks > 1:
        return (
            "It trains with transformers' Trainer, which shares out sequences, and pads them to the planned length.",
        )
    return ()


def _deepspeed_file(candidate: Candidate, cluster: Cluster, *, cpu_adam_builds: bool) -> ConfigFile:
    """Without a header, since JSON has no comments and the tools read strict JSON."""
    auto = candidate.scenario.training.trainer is not Trainer.LOOP
    config = deepspeed_config(candidate, cluster, auto=auto, cpu_adam_builds=cpu_adam_builds)
    return ConfigFile(name=DEEPSPEED_FILE, text=json.dumps(config, indent=2) + "\n")


def _header(candidate: Candidate, cluster: Cluster, *comments: str) -> tuple[str, ...]:
    scenario, estimate = candidate.scenario, candidate.estimate
    training, batch = scenario.training, scenario.batch
    method = training.method.value + ("" if training.method is Method.FULL else f" r={training.lora_rank}")
    processes = num_data_ranks(candidate, cluster)
    shared = scenario.strategy.split.num_ranks
    groups = "groups" if processes > 1 else "group"
    what = f"{groups} of {shared} processes" if shared > 1 else "processes"
    return (
        f"Written by launchkit for {candidate.model.name} on {cluster.text}:",
        f"{method} · {scenario.strategy.name} · {training.precision.value} · micro-batch {batch.micro_batch} × "
        f"{batch.gradient_accumulation_steps} accumulation × {processes} {what} = "
        f"{batch.global_batch(processes)} sequences of {batch.seq_len} tokens,",
        f"predicted to take {gib(estimate.device_peak_bytes)} of {gib(estimate.device_usable_bytes)} per GPU.",
        *comments,
    )


def _yaml_file(name: str, config: dict[str, Any], *, header: tuple[str, ...]) -> ConfigFile:
    comments = "".join(f"# {line}\n" for line in header)
    return ConfigFile(name=name, text=comments + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120))
