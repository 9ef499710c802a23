"""Axolotl's YAML: a whole fine-tune, data included. Written for Axolotl 0.19."""

from __future__ import annotations

from collections.abc import Mapping

from launchkit.errors import IllegalScenarioError
from launchkit.export.layout import (
    DEEPSPEED_FILE,
    OUTPUT_DIRECTORY,
    adapter_parts,
    adapter_sizes,
    autocast_format,
    check_expressible,
    clip_norm,
    ddp_arguments,
    fsdp_layout,
    gathers_float8,
    lora_target_modules,
    reenters,
)
from launchkit.hardware import Backend, Cluster
from launchkit.optimizers import find
from launchkit.plan import Candidate
from launchkit.recipe import RECIPES
from launchkit.scenario import (
    UNSHARDED,
    BackwardPrefetch,
    Checkpointing,
    Loss,
    Method,
    Precision,
    Sharding,
    StrategyKind,
)

DEFAULT_DATA = "train.jsonl"
_BITSANDBYTES_8BIT = ("adamw_bnb_8bit", "adamw_8bit")
_LOCAL_DATA_TYPES = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text"}
_LOSS_KEYS: dict[Loss, dict[str, object]] = {
    Loss.PLAIN: {},
    Loss.CHUNKED: {"chunked_cross_entropy": True},
    Loss.LIGER: {
        "plugins": ["axolotl.integrations.liger.LigerPlugin"],
        "liger_fused_linear_cross_entropy": True,
    },
    Loss.CCE: {
        "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],
        "cut_cross_entropy": True,
    },
}
_CHECKPOINTING_KEYS: dict[Checkpointing, dict[str, object]] = {
    Checkpointing.FULL: {},
    Checkpointing.SELECTIVE: {"selective_checkpointing": True},
    Checkpointing.OFFLOAD: {"activation_offloading": "hidden_states"},
    Checkpointing.REENTRANT: {},
}
_PRECISION_KEYS: dict[str, dict[str, object]] = {
    "no": {"bf16": False, "fp16": False},
    "fp16": {"bf16": False, "fp16": True},
    "bf16": {"bf16": True, "fp16": False},
    "fp8": {"bf16": True, "fp16": False, "fp8": True},  # which then wins: Axolotl hands accelerate its recipe
}

# Left unset, Axolotl 0.19 turns them all on for an adapter (``check_auto_enable_lora_kernels``) and keeps other tensors
# for the backward pass than PEFT, whose step is the one that is estimated.
FUSED_LORA = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


def axolotl_config(
    candidate: Candidate,
    cluster: Cluster,
    *,
    model: str | None = None,
    data: str | Mapping[str, object] = DEFAULT_DATA,
    deepspeed_file: str = DEEPSPEED_FILE,
) -> dict[str, object]:
    """The configuration of ``axolotl train`` for ``candidate``.

    ``model`` is a hub id or a directory, the candidate's own name by default. ``data`` is a path or a dataset's hub
    id, read as chat messages, or an entry of Axolotl's ``datasets`` as it stands.
    """
    check_expressible(candidate, cluster)
    check_axolotl(candidate, cluster)
    return axolotl_keys(candidate, cluster, model=model, data=data, deepspeed_file=deepspeed_file)


def axolotl_keys(
    candidate: Candidate,
    cluster: Cluster,
    *,
    model: str | None = None,
    data: str | Mapping[str, object] = DEFAULT_DATA,
    deepspeed_file: str = DEEPSPEED_FILE,
) -> dict[str, object]:
    """``axolotl_config`` without its checks: what a file says that somebody wrote in spite of them."""
    training, batch = candidate.scenario.training, candidate.scenario.batch
    recipe = RECIPES[training.method]
    return {
        "base_model": model or candidate.model.name,
        "datasets": [dict(data) if isinstance(data, Mapping) else _dataset(data)],
        "chat_template": "tokenizer_default",
        "output_dir": OUTPUT_DIRECTORY,
        "sequence_len": batch.seq_len,
        "sample_packing": training.packing,
        "pad_to_sequence_len": training.packing,
        "micro_batch_size": batch.micro_batch,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "num_epochs": 1,
        **_adapter(candidate),
        **_optimizer(training.optimizer),
        "learning_rate": recipe.learning_rate,
        "lr_scheduler": recipe.lr_scheduler,
        "max_grad_norm": clip_norm(candidate),
        **_PRECISION_KEYS[autocast_format(candidate.scenario)],
        **({"fp8_enable_fsdp_float8_all_gather": True} if gathers_float8(candidate) else {}),
        "tf32": cluster.gpu.tf32_flops_per_s > 0,
        "attn_implementation": training.attention.value,
        **_LOSS_KEYS[training.loss],
        **({"torch_compile": True} if training.compile else {}),
        **_checkpointing(candidate),
        **_strategy(candidate, cluster, deepspeed_file=deepspeed_file),
    }


def axolotl_notes(candidate: Candidate) -> tuple[str, ...]:
    """What Axolotl does otherwise than the plan assumed, in the direction of less memory."""
    scenario = candidate.scenario
    if scenario.training.precision in (Precision.BF16, Precision.FP8) and scenario.strategy.kind in UNSHARDED:
        return ("Axolotl loads the weights in bf16; the plan counted fp32 weights under autocast, so this takes less.",)
    fsdp, is_fsdp1 = scenario.strategy.fsdp, scenario.strategy.kind is StrategyKind.FSDP
    if is_fsdp1 and (fsdp.forward_prefetch or fsdp.backward_prefetch is not BackwardPrefetch.NONE):
        return ("Axolotl's FSDP1 prefetches nothing; the plan counted a prefetch, so this takes less, and longer.",)
    return ()


def _dataset(path: str) -> dict[str, object]:
    """Chat messages in the field ``messages``, from a local file or the hub."""
    suffix = path.rpartition(".")[2].lower()
    local = {"ds_type": _LOCAL_DATA_TYPES[suffix]} if suffix in _LOCAL_DATA_TYPES else {"split": "train"}
    return {"path": path, **local, "type": "chat_template", "field_messages": "messages"}


def _adapter(candidate: Candidate) -> dict[str, object]:
    training = candidate.scenario.training
    if training.method is Method.FULL:
        return {}
    modules = lora_target_modules(candidate)
    return {
        "adapter": training.method.value,
        **adapter_sizes(training),
        **({"lora_target_linear": True} if modules == ("all-linear",) else {"lora_target_modules": list(modules)}),
        **adapter_parts(training),
        **({"peft_use_dora": True} if training.dora else {}),
        **({"peft_use_rslora": True} if training.rslora else {}),
        **dict.fromkeys(FUSED_LORA, False),
    }


def _optimizer(name: str) -> dict[str, object]:
    """Axolotl takes the Trainer's optimizers by the Trainer's names, and has some of its own."""
    optimizer = find(name)
    arguments = dict(optimizer.trainer_arguments)
    return {"optimizer": arguments.pop("optim", optimizer.name), **arguments}


def _checkpointing(candidate: Candidate) -> dict[str, object]:
    """Under FSDP full checkpointing is FSDP's own, since the model's adds an all-gather to each block's backward."""
    scenario = candidate.scenario
    checkpointing = scenario.training.checkpointing
    if checkpointing is Checkpointing.NONE or (checkpointing is Checkpointing.FULL and scenario.strategy.kind.is_fsdp):
        return {"gradient_checkpointing": False}
    keys: dict[str, object] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reenters(candidate)},
    }
    return keys | _CHECKPOINTING_KEYS[checkpointing]


def _strategy(candidate: Candidate, cluster: Cluster, *, deepspeed_file: str) -> dict[str, object]:
    strategy = candidate.scenario.strategy
    if strategy.kind.zero_stage:
        return {"deepspeed": deepspeed_file}
    if strategy.kind.is_fsdp:
        return _fsdp(candidate, cluster)
    if strategy.split.tp > 1:
        return {"tensor_parallel_size": strategy.split.tp}
    return ddp_arguments(candidate)


def _fsdp(candidate: Candidate, cluster: Cluster) -> dict[str, object]:
    """Axolotl's FSDP keys carry no prefix, and unprefixed means version 1 unless ``fsdp_version`` says otherwise."""
    layout = fsdp_layout(candidate, cluster)
    section: dict[str, object] = {
        "auto_wrap_policy": layout.wrap_policy,
        "transformer_layer_cls_to_wrap": layout.wrap_classes,
        "state_dict_type": layout.state_dict_type,
        "final_state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": layout.cpu_ram_efficient_loading,
        "offload_params": layout.offload_params,
        "activation_checkpointing": layout.activation_checkpointing,
    }
    if layout.version == 1:
        section |= {"use_orig_params": candidate.scenario.strategy.fsdp.use_orig_params, "sync_module_states": True}
    else:
        section["reshard_after_forward"] = layout.sharding.reshard_after_forward
    strategy = candidate.scenario.strategy
    mesh = {"dp_replicate_size": layout.num_replicas, "dp_shard_size": layout.shard_size}
    if strategy.split.tp > 1:
        mesh |= {"tensor_parallel_size": strategy.split.tp}
    return {
        "fsdp_version": layout.version,
        "fsdp_config": section,
        **(mesh if strategy.kind is StrategyKind.HSDP or strategy.split.tp > 1 else {}),
    }


def check_axolotl(candidate: Candidate, cluster: Cluster) -> None:
    """What the other files can say and Axolotl refuses, ignores, or does in another way that takes more memory."""
    for holds, fact, fix in _refusals(candidate, cluster):
        if holds:
            raise IllegalScenarioError(f"Axolotl {fact}; {fix}, or leave Axolotl out")


def _refusals(candidate: Candidate, cluster: Cluster) -> tuple[tuple[bool, str, str], ...]:
    scenario = candidate.scenario
    training, strategy = scenario.training, scenario.strategy
    is_fsdp1, is_fsdp2 = strategy.kind is StrategyKind.FSDP, strategy.kind in (StrategyKind.FSDP2, StrategyKind.HSDP)
    is_unsharded = strategy.kind in UNSHARDED
    return (
        (
            bool(training.freeze),
            "names what is trained (unfrozen_parameters), which is not written for --freeze",
            "write that key yourself in the file of a plan without --freeze",
        ),
        (candidate.model.task != "causal-lm", f"is not for {candidate.model.task} here", "use --trainer hf"),
        (
            strategy.split.cp > 1,
            "shares sequences in a ring of flash attention, another than torch's that was planned",
            "use accelerate's file",
        ),
        (
            strategy.split.tp > 1 and training.method is not Method.FULL,
            "does not tell PEFT's adapters on split matrices how wide these are in all ranks",
            "use accelerate's file",
        ),
        (strategy.split.sp > 1, "has no key for DeepSpeed's Ulysses", "use accelerate's file"),
        (
            cluster.gpu.backend is Backend.CPU and not is_unsharded,
            f"cannot run {strategy.name} on CPU processes",
            "use --trainer hf",
        ),
        (
            training.precision is Precision.BF16_PURE
            or (training.precision is Precision.BF16_PARAMS and strategy.kind.is_fsdp),
            f"always autocasts, so that {training.precision} with {strategy.name} is not what runs",
            "use --precision bf16",
        ),
        (
            training.precision is Precision.FP16 and training.method is Method.FULL and is_unsharded,
            "loads the weights in fp16 and then cannot unscale their gradients",
            "use --precision bf16",
        ),
        (
            training.uses_transformer_engine,
            "hands accelerate torchao's recipe for fp8",
            "use --fp8-backend ao",
        ),
        (
            strategy.kind is StrategyKind.DDP and strategy.ddp.static_graph,
            "has no key for DDP's static_graph",
            "leave it out of --ddp-settings, or use --target trl",
        ),
        (
            is_fsdp1 and strategy.fsdp.sharding is not Sharding.FULL_SHARD,
            f"has no key for FSDP1's {strategy.fsdp.sharding}",
            "use --strategy fsdp2",
        ),
        (
            is_fsdp2 and training.optimizer in _BITSANDBYTES_8BIT,
            f"refuses {training.optimizer} with FSDP2",
            "use --optimizer adamw_torch_8bit",
        ),
        (
            training.optimizer == "muon" and (is_fsdp1 or bool(strategy.kind.zero_stage)),
            f"refuses muon with {strategy.name}",
            "use --strategy fsdp2",
        ),
        (
            is_fsdp1 and strategy.offload.params and "8bit" in training.optimizer,
            f"refuses {training.optimizer} with {strategy.name}",
            "use --optimizer adamw_torch",
        ),
    )
