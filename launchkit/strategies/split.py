"""Ranks that share one copy's step: tensor, context and sequence parallelism, with an engine that spreads the rest.

What each is here, and what it goes with:

- tensor parallel: transformers' own plan (``DistributedConfig(tp_size, fsdp_size, dp_replicate_size)``), alone or with
  FSDP2 over the ranks that hold the same part of a matrix. accelerate 1.15 cannot make that mesh itself of a model of
  transformers 5.23: its ``_prepare_tp`` imports a class that is gone. PEFT splits adapters alike, where nothing but
  tensor parallelism has cut the matrices.
- context parallel: torch's ring attention under accelerate's FSDP2, which shards the weights over these ranks as well.
- sequence parallel: DeepSpeed's Ulysses under ZeRO, which shards over these ranks as well.

A rank's step is traced as it runs (``TraceKey.tp``, ``cp``, ``sp``); here is what none of them can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.scenario import (
    UNSHARDED,
    Attention,
    Checkpointing,
    DeviceKind,
    Loss,
    Method,
    Offload,
    Precision,
    Scenario,
    Split,
    Strategy,
    StrategyKind,
    TraceKey,
    Trainer,
    is_fused_expert,
    names_in,
)
from launchkit.strategies.fsdp2 import num_sharing_ranks, shard_group_size

_Check = Callable[[Scenario, ModelProfile, Cluster], str | None]

# The engines that spread the rest of the job. Source: accelerate 1.15 ``ParallelismConfig``, ``Accelerator.prepare``.
_ENGINES = {
    "tp": (StrategyKind.SINGLE, StrategyKind.FSDP2, StrategyKind.HSDP),
    "cp": (StrategyKind.FSDP2, StrategyKind.HSDP),
    "sp": (StrategyKind.ZERO1, StrategyKind.ZERO2, StrategyKind.ZERO3),
}


def split_key(key: TraceKey, split: Split) -> TraceKey:
    """The key of the program that one of the ranks runs."""
    return replace(key, tp=split.tp, cp=split.cp, sp=split.sp)


def mesh_of(strategy: Strategy, cluster: Cluster) -> dict[str, int]:
    """Ranks in each dimension of the job, as accelerate's ``ParallelismConfig`` names them; the product is all ranks.

    Ranks that share a sequence shard the weights with the others, so that ``dp_shard`` is less than a shard group.
    """
    split, num_ranks = strategy.split, strategy.num_ranks(cluster.num_gpus)
    data = num_ranks // split.num_ranks
    shard = 1 if strategy.kind in UNSHARDED else data
    if strategy.kind.is_fsdp:
        shard = shard_group_size(strategy, cluster) // split.cp
    return {"dp_replicate": data // shard, "dp_shard": shard, "tp": split.tp, "cp": split.cp, "sp": split.sp}


def engines_of(split: Split) -> tuple[StrategyKind, ...]:
    """The engines that spread what the ranks of ``split`` do not share."""
    return _ENGINES[_kind(split)]


def refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """Why this split would not run, with what to type instead; None when it would, and where nothing is split."""
    if scenario.strategy.split.num_ranks == 1:
        return None
    reasons = (check(scenario, profile, cluster) for check in _CHECKS)
    return next((reason for reason in reasons if reason is not None), None)


def _option(split: Split) -> str:
    """The first degree as it is typed: ``--tp 2``."""
    return next(f"--{name} {getattr(split, name)}" for name in _ENGINES if getattr(split, name) > 1)


def _kind(split: Split) -> str:
    return next(name for name in _ENGINES if getattr(split, name) > 1)


def _combination(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """Source: ``ParallelismConfig.__post_init__`` for cp with sp."""
    split = scenario.strategy.split
    given = [f"--{name} {getattr(split, name)}" for name in _ENGINES if getattr(split, name) > 1]
    if len(given) == 1:
        return None
    if split.tp > 1:
        return (
            f"{given[0]} with {given[1]} needs accelerate to split the weights, which version 1.15 cannot do to a "
            f"model of transformers 5.23; use one of the two"
        )
    return f"{given[0]} and {given[1]} both share out the sequence, and accelerate refuses both; use one of the two"


def _engine(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    strategy = scenario.strategy
    engines = engines_of(strategy.split)
    if strategy.kind in engines:
        return None
    others = " or ".join(kind for kind in engines if kind is not StrategyKind.SINGLE)
    return f"{_option(strategy.split)} does not go with --strategy {strategy.kind}; use --strategy {others}"


def _ranks(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    strategy, num_gpus = scenario.strategy, cluster.num_gpus
    option, size = _option(strategy.split), strategy.split.num_ranks
    if num_gpus < size:
        return f"{option} takes {size} GPUs and {cluster.text} has {num_gpus}; use --gpus {size}x…, or a smaller degree"
    if num_gpus % size:
        return f"{option} does not divide {num_gpus} GPUs; use a divisor of {num_gpus}"
    in_node = cluster.node.num_gpus
    if in_node % size and size % in_node:
        return f"{option} would straddle nodes of {in_node} GPUs; use a divisor of {in_node}"
    if strategy.split.tp > 1 and strategy.kind.is_fsdp and num_sharing_ranks(strategy, cluster) == 1:
        return f"{option} on {num_gpus} GPUs leaves --strategy {strategy.kind} nothing to shard; use --strategy single"
    return None


def _heads(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """Whole heads on every rank. Ulysses repeats keys and values where ranks are a multiple of their heads."""
    split = scenario.strategy.split
    size = split.tp * split.sp  # of which one is 1; a ring shares out no heads
    counts = {"attention heads": profile.num_attention_heads, "key and value heads": profile.num_key_value_heads}
    for what, count in counts.items():
        repeats = split.sp > 1 and what != "attention heads" and count and size % count == 0
        if count % size and not repeats:
            return (
                f"{profile.name} has {count} {what}, which {_option(split)} does not divide; use a divisor of {count}"
            )
    return None


def _model(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """Source: accelerate 1.15 ``_attach_context_parallel_hooks``,
    ``_refuse_recurrent_layers_under_sequence_parallelism``."""
    split, option = scenario.strategy.split, _option(scenario.strategy.split)
    if profile.task != "causal-lm":
        return f"{option} is for causal language models, not for {profile.task}; leave it out"
    if split.tp > 1:
        return None
    others = [kind for kind in profile.layer_types if kind != "full_attention"]
    if split.sp > 1:
        others = [kind for kind in others if "linear" in kind or "recurrent" in kind or "mamba" in kind]
    elif profile.sliding_window and not profile.layer_types:
        others = ["sliding_attention"]
    if others:
        return f"{profile.name} has layers of {others[0]}, which accelerate refuses with {option}; use --tp instead"
    return None


def _training(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    training, split = scenario.training, scenario.strategy.split
    option = _option(split)
    if training.images or training.packing:
        given = "--images" if training.images else "--packing"
        return f"{option} is modelled for plain sequences of text; leave out {given}"
    if training.trainer is Trainer.TRL or training.loss is not Loss.PLAIN:
        return f"{option} is modelled with the model's own loss; use --trainer hf --loss plain"
    if training.checkpointing not in (Checkpointing.NONE, Checkpointing.FULL):
        return f"{option} is modelled without --checkpointing {training.checkpointing}; use --checkpointing full"
    if training.compile:
        return f"{option} is not modelled under torch.compile; leave out --compile"
    return None


def _adapters(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What PEFT 0.21 cannot put on split matrices. Source: ``_get_in_out_features`` (adapters as wide as what a rank
    holds, so a shard of its part under FSDP2), ``dispatch_bnb_4bit`` (reads attributes that a ``DTensor`` has not),
    ``DoraLinearLayer.get_weight_norm`` (adds a plain tensor to a split one), and ``finetune.split_adapters``."""
    training, strategy = scenario.training, scenario.strategy
    if strategy.split.tp == 1 or training.method is Method.FULL:
        return None
    option = f"{_option(strategy.split)} with --method {training.method}"
    if training.method is Method.QLORA:
        return f"{option} does not run: PEFT finds no 4-bit weights in split ones; use --method lora"
    if training.dora:
        return f"{option} and --dora does not run: PEFT cannot take the norm of a split weight; leave out --dora"
    if any(is_fused_expert(name) for name in names_in(training.lora_targets)):
        return f"{option} does not run on fused experts, which are split; use --lora-targets attention"
    if training.trainer is Trainer.AXOLOTL:
        return f"{option} fails in Axolotl, where nobody tells PEFT's adapters their whole width; use --trainer hf"
    if strategy.kind.is_fsdp:
        return (
            f"{option} does not run under --strategy {strategy.kind}: PEFT makes adapters as wide as FSDP's shards; "
            f"use --tp {cluster.num_gpus}, which leaves nothing to FSDP, or --strategy {strategy.kind} without --tp"
        )
    return None


def _attention(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """Source: transformers 5.23 ``Trainer._prepare_context_parallel_inputs``; accelerate 1.15
    ``DeepSpeedSequenceParallelConfig``."""
    training, split = scenario.training, scenario.strategy.split
    if split.tp > 1:
        return None
    if split.cp > 1 and training.precision is Precision.FP32:
        return f"{_option(split)} is modelled for torch's flash kernel, which takes no fp32; use --precision bf16"
    if split.cp > 1 and training.attention is not Attention.SDPA:
        return f"{_option(split)} works with sdpa attention alone, not {training.attention}; use --attention sdpa"
    if split.sp > 1 and training.attention is Attention.EAGER:
        return f"{_option(split)} does not work with eager attention; use --attention sdpa"
    if split.cp > 1 and cluster.gpu.device_kind is DeviceKind.CPU:
        return f"{_option(split)} needs GPUs: torch's ring attention has no kernel for a CPU; use --gpus 2xA100, say"
    return None


def _length(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    split, seq_len = scenario.strategy.split, scenario.batch.seq_len
    pieces = split.num_pieces
    if seq_len % pieces == 0:
        return None
    rounded = max(pieces, seq_len // pieces * pieces)
    return f"--seq-len {seq_len} is not cut into {pieces} equal pieces for {_option(split)}; use --seq-len {rounded}"


def _offload(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    strategy = scenario.strategy
    if strategy.split.tp > 1 and strategy.offload is not Offload.NONE:
        return (
            f"{_option(strategy.split)} with --offload {strategy.offload} is not modelled; use --offload none, or "
            "--strategy fsdp2 without it"
        )
    return None


def _optimizer(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    optimizer = scenario.training.optimizer
    if scenario.strategy.split.tp > 1 and optimizer.endswith("8bit") and "torch" not in optimizer:
        return (
            f"--optimizer {optimizer} cannot step on split tensors; use --optimizer adamw_torch_fused or "
            "adamw_torch_8bit"
        )
    return None


_CHECKS: tuple[_Check, ...] = (
    _combination,
    _engine,
    _ranks,
    _model,
    _heads,
    _training,
    _adapters,
    _attention,
    _length,
    _offload,
    _optimizer,
)
