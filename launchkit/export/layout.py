"""What every exporter reads off a candidate: one place, so that the files written for one plan cannot disagree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launchkit.engine_settings import DDP, STATE_DICTS, WRAPS, word_of
from launchkit.errors import IllegalScenarioError
from launchkit.hardware import Backend, Cluster
from launchkit.plan import Candidate
from launchkit.recipe import RECIPES
from launchkit.scenario import (
    UNSHARDED,
    Checkpointing,
    CommHook,
    DdpSettings,
    Method,
    Offload,
    Precision,
    Scenario,
    Sharding,
    StrategyKind,
    Trainer,
    Training,
    Wrap,
    is_fused_expert,
    names_in,
)
from launchkit.strategies.fsdp2 import num_sharing_ranks, shard_group_size
from launchkit.strategies.split import mesh_of
from launchkit.units import MIB

DEEPSPEED_FILE = "deepspeed.json"
OUTPUT_DIRECTORY = "outputs"
_BF16_STATES = (Precision.BF16_PARAMS, Precision.BF16_PURE)

# What ``--lora-targets attention`` stands for, by model type. Source: the attention classes of transformers 5.23.
_ATTENTION_MODULES: dict[str, tuple[str, ...]] = {
    "bloom": ("query_key_value", "dense"),
    "falcon": ("query_key_value", "dense"),
    "gpt2": ("c_attn", "c_proj"),
    "gpt_neox": ("query_key_value", "dense"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense"),
    "phi3": ("qkv_proj", "o_proj"),
}
_USUAL_ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
# Models whose blocks have no linear layers but those of the usual attention and a gated MLP.
USUAL_LINEAR_MODULES = (*_USUAL_ATTENTION_MODULES, "gate_proj", "up_proj", "down_proj")
USUAL_MODELS = ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
# What PEFT adapts where no ``target_modules`` are named. Source: peft 0.21
# ``TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING``.
_DEFAULT_LORA_MODULES: dict[str, tuple[str, ...]] = {
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
}
_USUAL_LORA_MODULES = ("q_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class FsdpLayout:
    """FSDP as an exporter spells it. ``num_replicas`` is above 1 only where shard groups are replicated (HSDP)."""

    version: int
    sharding: Sharding
    offload_params: bool
    cpu_ram_efficient_loading: bool
    activation_checkpointing: bool
    state_dict_type: str
    wrap_policy: str
    wrap_classes: str
    num_replicas: int
    shard_size: int


def num_processes(candidate: Candidate, cluster: Cluster) -> int:
    """Processes over all nodes: those of one copy of the model for ``single``, else one per GPU."""
    return candidate.scenario.strategy.num_ranks(cluster.num_gpus)


def num_data_ranks(candidate: Candidate, cluster: Cluster) -> int:
    """Processes that see batches of their own, where those that share one count once."""
    return candidate.scenario.strategy.num_data_ranks(cluster.num_gpus)


def num_nodes(candidate: Candidate, cluster: Cluster) -> int:
    """Nodes that take part: as many as the processes fill."""
    return max(1, num_processes(candidate, cluster) // cluster.node.num_gpus)


def clip_norm(candidate: Candidate) -> float:
    """The gradient norm that is clipped to; 0 turns clipping off, which the plain loop means."""
    training = candidate.scenario.training
    return 0.0 if training.trainer is Trainer.LOOP else training.max_grad_norm


def autocast_format(scenario: Scenario) -> str:
    """Accelerate's ``mixed_precision``: ``no``, ``fp16``, ``bf16`` or ``fp8``.

    FSDP upcasts trainable weights to fp32 as soon as mixed precision is on, so a full fine-tune of bf16 weights needs
    ``no`` there; adapters are fp32 anyway, and frozen weights stay as they are. DeepSpeed computes in the dtype of its
    weights, so that its bf16 is ``bf16`` whatever holds the states.
    """
    precision, kind = scenario.training.precision, scenario.strategy.kind
    if precision not in _BF16_STATES:
        return {Precision.FP32: "no", Precision.FP16: "fp16", Precision.BF16: "bf16", Precision.FP8: "fp8"}[precision]
    if kind.zero_stage:
        return "bf16"
    upcasts = kind.is_fsdp and scenario.training.method is Method.FULL
    return "bf16" if precision is Precision.BF16_PARAMS and not upcasts else "no"


def gathers_float8(candidate: Candidate) -> bool:
    """Whether torchao's weights are cast before FSDP2 gathers them."""
    strategy = candidate.scenario.strategy
    training = candidate.scenario.training
    is_torchao = training.precision is Precision.FP8 and not training.uses_transformer_engine
    return is_torchao and strategy.kind.is_fsdp and strategy.fsdp.float8_all_gather


def float8_section(candidate: Candidate) -> dict[str, object]:
    """Accelerate's ``fp8_config``; nothing without fp8.

    torchao's all-gather is on unless it is turned off, and where nothing is gathered it must be: it makes parameters
    anew, and an optimizer that was there before keeps the old ones, so that the converted layers never train
    (accelerate 1.15 ``_prepare_ao``, torchao 0.18 ``Float8Linear.from_float``).
    """
    training = candidate.scenario.training
    if training.precision is not Precision.FP8:
        return {}
    if training.uses_transformer_engine:
        return {"backend": "TE"}  # delayed scaling, as its recipe has it where nothing else is said
    return {
        "backend": "AO",
        "enable_fsdp_float8_all_gather": gathers_float8(candidate),
        "pad_inner_dim": True,
    }


def attention_modules(model_type: str) -> tuple[str, ...]:
    """The linear layers of the attention of ``model_type``, as PEFT's ``target_modules`` names them."""
    return _ATTENTION_MODULES.get(model_type, _USUAL_ATTENTION_MODULES)


def named_targets(text: str, *, model_type: str) -> str:
    """``--lora-targets`` by the shortest name of the same layers: files spell out what has one, and the programs of the
    catalogue go by it."""
    names = frozenset(names_in(text))
    if model_type in USUAL_MODELS and names == frozenset(USUAL_LINEAR_MODULES):
        return "all-linear"
    return "attention" if names == frozenset(attention_modules(model_type)) else text


def default_lora_modules(model_type: str) -> tuple[str, ...]:
    """The modules that PEFT adapts in a model of ``model_type`` where none are named."""
    return _DEFAULT_LORA_MODULES.get(model_type, _USUAL_LORA_MODULES)


def lora_target_modules(candidate: Candidate) -> tuple[str, ...]:
    """PEFT's ``target_modules``; ``("all-linear",)`` is PEFT's own word for every linear layer but the head."""
    targets = candidate.scenario.training.lora_targets
    if targets == "attention":
        return attention_modules(candidate.model.model_type)
    return tuple(name for name in names_in(targets) if not is_fused_expert(name))


def lora_target_parameters(training: Training) -> tuple[str, ...]:
    """PEFT's ``target_parameters``: experts that one parameter holds."""
    return tuple(name for name in names_in(training.lora_targets) if is_fused_expert(name))


def lora_modules_to_save(training: Training) -> tuple[str, ...]:
    """PEFT's ``modules_to_save``: what is trained whole beside the adapters."""
    return names_in(training.lora_modules_to_save)


def adapter_sizes(training: Training) -> dict[str, object]:
    """Width and strength of an adapter on its base, as Axolotl and TRL both name them."""
    return {
        "load_in_4bit": training.method is Method.QLORA,
        "lora_r": training.lora_rank,
        "lora_alpha": RECIPES[training.method].lora_alpha(training.lora_rank),
        "lora_dropout": training.lora_dropout,
    }


def adapter_parts(training: Training) -> dict[str, object]:
    """What an adapter has besides the modules it targets, as both name it; nothing where it has nothing else."""
    parts = {
        "lora_target_parameters": list(lora_target_parameters(training)),
        "lora_modules_to_save": list(lora_modules_to_save(training)),
    }
    return {key: names for key, names in parts.items() if names}


def reenters(candidate: Candidate) -> bool:
    scenario = candidate.scenario
    return scenario.training.reenters(scenario.strategy.kind)


def checkpointing_arguments(candidate: Candidate) -> dict[str, object]:
    """``gradient_checkpointing_kwargs``: torch's own, the Trainer's ``offload`` and TRL's ``selective``."""
    return {"use_reentrant": reenters(candidate), **candidate.scenario.training.checkpointing.trainer_arguments}


def ddp_arguments(candidate: Candidate) -> dict[str, object]:
    """DDP's settings as ``TrainingArguments`` and Axolotl name them; nothing under another strategy."""
    strategy = candidate.scenario.strategy
    if strategy.kind is not StrategyKind.DDP:
        return {}
    cap = strategy.ddp.bucket_cap_bytes
    return {
        **({} if cap == DdpSettings.bucket_cap_bytes else {"ddp_bucket_cap_mb": cap // MIB}),
        "ddp_find_unused_parameters": strategy.ddp.find_unused_parameters,
        "ddp_broadcast_buffers": strategy.ddp.broadcast_buffers,
    }


def ddp_advice(candidate: Candidate) -> str:
    """What a script has to be written like to have DDP's settings, which no file or variable of accelerate's tells it;
    empty where they are the defaults."""
    strategy = candidate.scenario.strategy
    changed = DDP.changed(strategy.ddp, kind=strategy.kind)
    spelled = {"true": "True", "false": "False", "fp16": '"fp16"', "bf16": '"bf16"'}
    arguments = ", ".join(
        f"{name}=DDPCommunicationHookType({spelled[word]})"
        if name == "comm_hook"
        else f"{name}={spelled.get(word, word)}"
        for name, word in changed.items()
    )
    return f"Accelerator(kwargs_handlers=[DistributedDataParallelKwargs({arguments})])" if changed else ""


def fsdp_layout(candidate: Candidate, cluster: Cluster) -> FsdpLayout:
    """FSDP's settings with the defaults resolved. Call ``check_expressible`` first."""
    scenario = candidate.scenario
    fsdp, kind = scenario.strategy.fsdp, scenario.strategy.kind
    mesh = mesh_of(scenario.strategy, cluster)
    return FsdpLayout(
        version=1 if kind is StrategyKind.FSDP else 2,
        sharding=fsdp.sharding,
        offload_params=scenario.strategy.offloads_params,
        cpu_ram_efficient_loading=scenario.loads_on_first_rank,
        activation_checkpointing=scenario.training.checkpointing is Checkpointing.FULL,
        state_dict_type=word_of(STATE_DICTS, fsdp.full_state_dict),
        wrap_policy=word_of(WRAPS, fsdp.wrap if kind is StrategyKind.FSDP else Wrap.BLOCKS),
        wrap_classes=",".join(candidate.model.block_classes),
        num_replicas=mesh["dp_replicate"],
        shard_size=mesh["dp_shard"],
    )


def is_split_by_transformers(candidate: Candidate) -> bool:
    """Whether the script splits the model as it loads it (``DistributedConfig``), FSDP's shards included, and nothing
    is left for accelerate to shard."""
    return candidate.scenario.strategy.split.tp > 1


def distributed_config(candidate: Candidate, cluster: Cluster) -> dict[str, object]:
    """The arguments of transformers' ``DistributedConfig`` for a model that is split as it is loaded; none elsewhere.

    Source: transformers 5.23 ``distributed/configuration_utils.py``. Its FSDP computes in 16 bits if told so, and
    reduces in fp32.
    """
    if not is_split_by_transformers(candidate):
        return {}
    strategy = candidate.scenario.strategy
    mesh = mesh_of(strategy, cluster)
    parts: dict[str, object] = {"tp_size": mesh["tp"]}
    if strategy.kind.is_fsdp:
        parts["fsdp_size"] = mesh["dp_shard"]
        parts |= {"dp_replicate_size": mesh["dp_replicate"]} if mesh["dp_replicate"] > 1 else {}
        parts |= {"fsdp_mixed_precision": True} if candidate.scenario.training.precision.is_mixed else {}
    return parts


def mesh_section(candidate: Candidate, cluster: Cluster) -> dict[str, object]:
    """What accelerate's ``ParallelismConfig`` has to be told, by its names; nothing where one dimension is all.

    A model that transformers has split counts its replicas as shards, as the Trainer tells accelerate. The ring's and
    Ulysses' settings are those that were traced. Source: accelerate 1.15 ``utils/launch.py``.
    """
    strategy = candidate.scenario.strategy
    split, mesh = strategy.split, mesh_of(strategy, cluster)
    if split.num_ranks == 1 and strategy.kind is not StrategyKind.HSDP:
        return {}
    if split.tp > 1:
        shards = mesh["dp_replicate"] * mesh["dp_shard"]
        return {"tp_size": split.tp, **({"dp_shard_size": shards} if shards > 1 else {})}
    sizes: dict[str, object] = {"dp_replicate_size": mesh["dp_replicate"], "dp_shard_size": mesh["dp_shard"]}
    if split.cp > 1:
        sizes |= {"cp_size": split.cp, "cp_backend": "torch", "cp_comm_strategy": "allgather"}
    if split.sp > 1:
        attention = candidate.scenario.training.attention.value
        sizes |= {"sp_size": split.sp, "sp_backend": "deepspeed", "sp_seq_length_is_variable": True}
        sizes |= {"sp_attn_implementation": attention}
    return sizes


def check_expressible(candidate: Candidate, cluster: Cluster) -> None:
    """Raises ``IllegalScenarioError`` for what no engine's file can say, or what an engine would silently ignore."""
    for applies, fact, fix in _REFUSALS:
        if applies(candidate, cluster):
            raise IllegalScenarioError(f"{fact.format(name=candidate.scenario.strategy.name)}; {fix}")


def _shard_size(candidate: Candidate, cluster: Cluster) -> int:
    return candidate.scenario.strategy.fsdp.shard_group_size or cluster.node.num_gpus


def _is_cpu_split(candidate: Candidate, cluster: Cluster) -> bool:
    return candidate.scenario.strategy.split.tp > 1 and cluster.gpu.backend is Backend.CPU


def _is_cpu_fsdp(candidate: Candidate, cluster: Cluster) -> bool:
    return candidate.scenario.strategy.kind.is_fsdp and cluster.gpu.backend is Backend.CPU


def _has_useless_offload(candidate: Candidate, cluster: Cluster) -> bool:
    strategy = candidate.scenario.strategy
    return strategy.kind in UNSHARDED and strategy.offload is not Offload.NONE


def _has_partial_fsdp_offload(candidate: Candidate, cluster: Cluster) -> bool:
    strategy = candidate.scenario.strategy
    return strategy.kind.is_fsdp and strategy.offload in (Offload.OPTIMIZER, Offload.NVME)


def _has_ignored_zero_offload(candidate: Candidate, cluster: Cluster) -> bool:
    strategy = candidate.scenario.strategy
    return strategy.kind.zero_stage in (1, 2) and strategy.offload.params


def _has_fsdp2_without_shards(candidate: Candidate, cluster: Cluster) -> bool:
    strategy = candidate.scenario.strategy
    is_fsdp2 = strategy.kind in (StrategyKind.FSDP2, StrategyKind.HSDP)
    return is_fsdp2 and strategy.fsdp.sharding is Sharding.NO_SHARD


def _has_hybrid_fsdp2(candidate: Candidate, cluster: Cluster) -> bool:
    strategy = candidate.scenario.strategy
    return strategy.kind is StrategyKind.FSDP2 and strategy.fsdp.sharding.is_hybrid


def _has_bad_shard_groups(candidate: Candidate, cluster: Cluster) -> bool:
    strategy = candidate.scenario.strategy
    size, num_ranks = shard_group_size(strategy, cluster), num_sharing_ranks(strategy, cluster)
    return strategy.kind is StrategyKind.HSDP and (num_ranks % size != 0 or not 1 < size < num_ranks)


def _has_unwritable_fsdp1_setting(candidate: Candidate, cluster: Cluster) -> bool:
    strategy = candidate.scenario.strategy
    has_own_groups = strategy.fsdp.sharding.is_hybrid and _shard_size(candidate, cluster) != cluster.node.num_gpus
    return strategy.kind is StrategyKind.FSDP and (has_own_groups or not strategy.fsdp.limit_all_gathers)


def _has_unwritable_ddp_setting(candidate: Candidate, cluster: Cluster) -> bool:
    strategy = candidate.scenario.strategy
    ddp = strategy.ddp
    is_unwritable = ddp.gradient_as_bucket_view or ddp.comm_hook is not CommHook.NONE
    return strategy.kind is StrategyKind.DDP and is_unwritable


def _has_unnamed_blocks(candidate: Candidate, cluster: Cluster) -> bool:
    return candidate.scenario.strategy.kind.is_fsdp and not candidate.model.block_classes


def _has_fp8_zero(candidate: Candidate, cluster: Cluster) -> bool:
    scenario = candidate.scenario
    return bool(scenario.strategy.kind.zero_stage) and scenario.training.precision is Precision.FP8


def _has_adapter_under_fp8(candidate: Candidate, cluster: Cluster) -> bool:
    training = candidate.scenario.training
    return training.precision is Precision.FP8 and training.method is not Method.FULL


def _has_fp8_elsewhere(candidate: Candidate, cluster: Cluster) -> bool:
    """Under an engine that the layers are not planned with."""
    scenario = candidate.scenario
    strategy = scenario.strategy
    if scenario.training.uses_transformer_engine and strategy.kind not in UNSHARDED:
        return True
    is_other = strategy.kind is StrategyKind.FSDP or strategy.split.num_ranks > 1 or strategy.offloads_params
    return scenario.training.precision is Precision.FP8 and is_other


def _has_fp8_on_cpu(candidate: Candidate, cluster: Cluster) -> bool:
    return candidate.scenario.training.precision is Precision.FP8 and cluster.gpu.backend is Backend.CPU


def _has_offloaded_bf16_states(candidate: Candidate, cluster: Cluster) -> bool:
    scenario = candidate.scenario
    is_zero_offload = bool(scenario.strategy.kind.zero_stage) and scenario.strategy.offload.optimizer
    return is_zero_offload and scenario.training.precision in _BF16_STATES


_Refusal = tuple[Callable[[Candidate, Cluster], bool], str, str]
_REFUSALS: tuple[_Refusal, ...] = (
    (_has_useless_offload, "{name} is a strategy that offloads nothing", "use --strategy fsdp2 or --strategy zero2"),
    (
        _has_partial_fsdp_offload,
        "{name} does not exist: FSDP moves parameters, gradients and optimizer states to the host together",
        "use --offload params, or --strategy zero2",
    ),
    (
        _has_ignored_zero_offload,
        "{name} would be ignored: DeepSpeed offloads parameters only in stage 3",
        "use --offload optimizer, or --strategy zero3",
    ),
    (_has_fsdp2_without_shards, "{name} does not exist: FSDP2 always shards", "use --strategy ddp"),
    (_has_hybrid_fsdp2, "{name} is what --strategy hsdp does", "use --strategy hsdp"),
    (
        _has_bad_shard_groups,
        "{name} cannot divide these GPUs into several equal shard groups",
        "use --strategy fsdp2, or more nodes",
    ),
    (
        _has_unwritable_fsdp1_setting,
        "{name} with its own shard groups, or without limit_all_gathers, can be written to no file",
        "use --strategy hsdp",
    ),
    (
        _has_unwritable_ddp_setting,
        "{name} with gradient_as_bucket_view or comm_hook can be written to no file",
        "leave them out of --ddp-settings, start the built-in fine-tune, or pass DistributedDataParallelKwargs to the "
        "Accelerator of a script of your own",
    ),
    (_has_unnamed_blocks, "{name} needs the class of the model's blocks, and none is known", "use --strategy zero3"),
    (_has_fp8_zero, "{name} has no fp8", "use --precision bf16, or --strategy fsdp2"),
    (_has_fp8_on_cpu, "fp8 is for GPUs, and there is none", "use --precision bf16"),
    (_has_adapter_under_fp8, "accelerate's fp8 is for full fine-tunes", "use --precision bf16-params"),
    (
        _has_fp8_elsewhere,
        "{name} does not go with this fp8",
        "use --precision bf16, or --strategy fsdp2 --fp8-backend ao without offload and split",
    ),
    (
        _has_offloaded_bf16_states,
        "{name} keeps fp32 optimizer states on the host",
        "use --precision bf16, or --offload none",
    ),
    (
        _is_cpu_split,
        "{name} on CPU processes is refused by accelerate, which knows of no such ranks there",
        "start it with launchkit launch",
    ),
    (
        _is_cpu_fsdp,
        "{name} on CPU processes becomes DDP under accelerate, without a word",
        "use --strategy zero3, or start it with launchkit launch",
    ),
)
