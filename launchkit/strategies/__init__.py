"""One module per engine. Each has the three functions below, which choose the module by the strategy's kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, Protocol

from launchkit.hardware import Backend, Cluster, Gpu
from launchkit.model import ModelProfile
from launchkit.optimizers import find
from launchkit.program import Owner, StepProgram
from launchkit.scenario import (
    UNSHARDED,
    Attention,
    Checkpointing,
    Compute,
    DeviceKind,
    Loss,
    Method,
    Offload,
    Precision,
    Scenario,
    Strategy,
    StrategyKind,
    TraceKey,
    Trainer,
    Training,
)
from launchkit.strategies import split
from launchkit.units import round_up


class Engine(Protocol):
    """What a module of this package offers."""

    def trace_key(
        self, training: Training, strategy: Strategy, device: DeviceKind, *, single_sequence: bool = False
    ) -> TraceKey: ...

    def refusal(self, scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None: ...

    def rewrite(self, program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> StepProgram: ...


_MODULES: Mapping[StrategyKind, str] = {
    StrategyKind.SINGLE: "single",
    StrategyKind.DDP: "ddp",
    StrategyKind.FSDP: "fsdp1",
    StrategyKind.FSDP2: "fsdp2",
    StrategyKind.HSDP: "hsdp",
    StrategyKind.ZERO1: "zero",
    StrategyKind.ZERO2: "zero",
    StrategyKind.ZERO3: "zero",
}


@cache
def engine(kind: StrategyKind) -> Engine:
    """The module of a strategy, imported when it is first asked for: few plans look at all of them."""
    module: Any = import_module(f"{__name__}.{_MODULES[kind]}")
    return module  # type: ignore[no-any-return]


def trace_key(training: Training, strategy: Strategy, device: DeviceKind, *, single_sequence: bool = False) -> TraceKey:
    """Which of a model's programs the strategy starts from. ``single_sequence`` when the micro-batch is 1."""
    key = engine(strategy.kind).trace_key(training, strategy, device, single_sequence=single_sequence)
    return split.split_key(key, strategy.split)


def rewrite(program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> StepProgram:
    """The step of the largest rank: ``program`` as the strategy runs it, with its optimizer."""
    return engine(scenario.strategy.kind).rewrite(program, scenario=scenario, cluster=cluster)


def with_batches_ahead(program: StepProgram, scenario: Scenario, device: DeviceKind) -> StepProgram:
    """``program`` with the inputs of every micro-batch of the step, which the Trainer takes from its loader before the
    first one, and on a CPU of one more, which the loader has fetched: to a GPU it goes when it is asked for.

    Source: transformers 5.24 ``Trainer.get_batch_samples``, accelerate 1.15 ``DataLoaderShard.__iter__``.
    """
    if scenario.training.trainer is Trainer.LOOP:
        return program
    num_batches = scenario.batch.gradient_accumulation_steps + (device is DeviceKind.CPU)
    persistent = (
        storage._replace(count=storage.count * num_batches) if storage.owner is Owner.INPUTS else storage
        for storage in program.persistent
    )
    return replace(program, persistent=tuple(persistent))


def refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """Why this combination would be refused when it is launched, with what to type instead; None when it would not."""
    find(scenario.training.optimizer)
    return (
        _pointless(scenario.training)
        or _freezing_refusal(scenario)
        or _float8_refusal(scenario, profile, cluster)
        or _checkpointing_refusal(scenario, cluster)
        or _optimizer_refusal(scenario)
        or split.refusal(scenario, profile, cluster)
        or _hardware_refusal(scenario, cluster)
        or _model_refusal(scenario, profile, cluster)
        or _head_refusal(scenario, profile, cluster)
        or _engine_refusal(scenario, profile, cluster)
    )


def _pointless(training: Training) -> str | None:
    """Settings of an adapter where there is none."""
    if training.method is not Method.FULL:
        return None
    settings = {
        f"--lora-dropout {training.lora_dropout:g}": training.lora_dropout > 0,
        "--dora": training.dora,
        "--rslora": training.rslora,
        f"--lora-modules-to-save {training.lora_modules_to_save}": bool(training.lora_modules_to_save),
    }
    given = next((setting for setting, is_given in settings.items() if is_given), None)
    return given and f"{given} says nothing under --method full; add --method lora"


def _freezing_refusal(scenario: Scenario) -> str | None:
    """Where frozen parts of a full fine-tune are not modelled, or mean nothing."""
    training, strategy = scenario.training, scenario.strategy
    if not training.freeze:
        return None
    facts = {
        f"--method {training.method} freezes all but its adapters; leave out --freeze": (
            training.method is not Method.FULL
        ),
        f"--freeze with {strategy.split.text} is not modelled; leave out one of them": strategy.split.num_ranks > 1,
        "FSDP1 flattens no frozen weights with others under use_orig_params=false; set it to true": (
            strategy.kind is StrategyKind.FSDP and not strategy.fsdp.use_orig_params
        ),
        "--freeze with --precision fp8 is not modelled; use --precision bf16": training.precision is Precision.FP8,
        "re-entered checkpoints of frozen embeddings get no gradients; use --checkpointing full": (
            training.checkpointing is Checkpointing.REENTRANT
        ),
    }
    return next((fact for fact, holds in facts.items() if holds), None)


def _float8_refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What the layers that accelerate puts in for fp8 do not go with. On a CPU torchao's run, so that a trace can be
    held against the real allocator; nothing is launched so.

    Source: accelerate 1.15 ``state.py`` (``check_cuda_fp8_capability``), ``utils/ao.py``,
    ``utils/transformer_engine.py``: every ``nn.Linear`` is converted, whatever it holds. torchao's backward makes every
    weight's gradient, trained or not, and Transformer Engine's weights are new ones, which are trained.
    """
    training, strategy, gpu = scenario.training, scenario.strategy, cluster.gpu
    if training.precision is not Precision.FP8:
        return None
    if training.uses_transformer_engine and (reason := _transformer_engine_refusal(scenario, profile, cluster)):
        return reason
    facts = {
        f"{gpu.name} has no fp8; use --precision bf16, or a GPU of compute capability 8.9 or later": (
            gpu.device_kind is not DeviceKind.CPU and not gpu.supports_fp8
        ),
        "accelerate's fp8 takes packed 4-bit layers for linear ones and fails; use --precision bf16-params": (
            training.method is Method.QLORA
        ),
        "accelerate's fp8 makes gradients of frozen weights too, and drops them; use --precision bf16-params": (
            training.method is Method.LORA
        ),
        "accelerate takes no fp8 beside DeepSpeed's file; use --strategy fsdp2, or --precision bf16": (
            strategy.kind.zero_stage > 0
        ),
        "torchao's fp8 goes with FSDP2, not with the flat parameters of FSDP1; use --strategy fsdp2": (
            strategy.kind is StrategyKind.FSDP
        ),
        f"--precision fp8 with {strategy.split.text} is not modelled; use --precision bf16": (
            strategy.split.num_ranks > 1
        ),
        f"--precision fp8 with --offload {strategy.offload} is not modelled; use --precision bf16": (
            strategy.offload is not Offload.NONE
        ),
    }
    return next((fact for fact, holds in facts.items() if holds), None)


def _transformer_engine_refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What of accelerate's use of Transformer Engine does not run, or trains nothing.

    Source: accelerate 1.15 ``Accelerator._prepare_te``, ``_prepare_fsdp2`` (which has no ``apply_fp8_autowrap``),
    ``utils/transformer_engine.py`` (``convert_model`` copies a tied head's weight); transformers 5.23
    ``Trainer._prepare_for_training``; axolotl's ``additional_accelerator_args``; Transformer Engine 2.18
    ``pytorch/utils.py`` (``assert_dim_for_fp8_exec``) and ``cublaslt_gemm.cu``, whose leading dimensions 16 divides.
    """
    training, batch, gpu = scenario.training, scenario.batch, cluster.gpu
    kind, tokens = scenario.strategy.kind, scenario.batch.micro_batch * scenario.batch.seq_len
    divisor = 16 if gpu.transposes_float8 else 8
    copies_head = profile.tied_embeddings and profile.vocab_size % 16 == 0 and profile.hidden_size % 16 == 0
    facts = {
        f"Transformer Engine's fp8 takes an NVIDIA GPU of compute capability 8.9 or later, which {gpu.name} is not; "
        "use --precision bf16": gpu.backend is not Backend.CUDA or not gpu.supports_fp8,
        "Axolotl hands accelerate torchao's recipe; use --fp8-backend ao": training.trainer is Trainer.AXOLOTL,
        "accelerate puts Transformer Engine's layers in under FSDP2 and never turns their 8 bits on; use --fp8-backend "
        "ao, or --strategy ddp": kind in (StrategyKind.FSDP2, StrategyKind.HSDP),
        "accelerate takes model and optimizer together for Transformer Engine, and under FSDP1 the Trainer hands them "
        "over apart; use --strategy fsdp2 --fp8-backend ao": kind is StrategyKind.FSDP,
        "Transformer Engine under DeepSpeed is not modelled; use --strategy ddp, or --fp8-backend ao --strategy "
        "fsdp2": kind.zero_stage > 0,
        f"accelerate copies the head of {profile.name}, which is tied to its embeddings, for Transformer Engine, and "
        "never trains the copy; use --fp8-backend ao": copies_head,
        f"Transformer Engine's products take a multiple of {divisor} tokens, which --micro-batch {batch.micro_batch} × "
        f"--seq-len {batch.seq_len} is not; use --seq-len {round_up(batch.seq_len, divisor)}": tokens % divisor > 0,
    }
    return next((fact for fact, holds in facts.items() if holds), None)


def _checkpointing_refusal(scenario: Scenario, cluster: Cluster) -> str | None:
    """FSDP wraps blocks itself, with no choice of what is kept or where (accelerate's ``activation_checkpointing``);
    transformers pins what it holds on the host, which takes a GPU's driver."""
    checkpointing, kind = scenario.training.checkpointing, scenario.strategy.kind
    if checkpointing is Checkpointing.OFFLOAD and cluster.gpu.device_kind is DeviceKind.CPU:
        return "--checkpointing offload moves activations off a GPU, and there is none; use --checkpointing full"
    if checkpointing not in (Checkpointing.NONE, Checkpointing.FULL) and kind.is_fsdp:
        return f"--checkpointing {checkpointing} does not exist under --strategy {kind}; use --checkpointing full"
    return None


def _optimizer_refusal(scenario: Scenario) -> str | None:
    """Source: transformers 5.23 ``_setup_low_rank_optimizer``; a shard of a matrix has no projection of its own."""
    optimizer, kind = find(scenario.training.optimizer), scenario.strategy.kind
    if optimizer.in_backward and kind is not StrategyKind.SINGLE:
        return f"{optimizer.name} updates inside the backward pass of one process; use --strategy single"
    if optimizer.in_backward and scenario.batch.gradient_accumulation_steps > 1:
        return f"{optimizer.name} cannot accumulate gradients; use --global-batch {scenario.batch.micro_batch}"
    if optimizer.updates_late and scenario.training.precision is Precision.FP16:
        return f"{optimizer.name} never unscales what accelerate scales for --precision fp16; use --precision bf16"
    if optimizer.in_backward and scenario.strategy.split.num_ranks > 1:
        return f"{optimizer.name} updates inside the backward pass of one process; leave out the other ranks"
    if optimizer.target_modules and scenario.strategy.split.tp > 1:
        return f"{optimizer.name} projects whole matrices, and --tp shares them out; use --strategy ddp without it"
    is_whole = kind in UNSHARDED and scenario.strategy.split.num_ranks == 1
    if optimizer.fetches_states and not is_whole:
        return f"{optimizer.name} keeps states on the host, where no engine looks for them; use --strategy ddp"
    if optimizer.target_modules and kind not in UNSHARDED:
        return f"{optimizer.name} projects whole matrices, and --strategy {kind} shards them; use --strategy ddp"
    return None


# Losses that a trainer does not have, or has in another form than is traced. The plain loop may patch in what it likes.
_WITHOUT_LOSS = {
    (Trainer.LOOP, Loss.CHUNKED): "--loss chunked is that of TRL's trainer; add --trainer trl",
    (Trainer.HF, Loss.CHUNKED): "--loss chunked is that of TRL's trainer; add --trainer trl",
    (
        Trainer.AXOLOTL,
        Loss.CHUNKED,
    ): "Axolotl compiles its chunked loss, which is not modelled; use --loss liger",
    (Trainer.TRL, Loss.PLAIN): "TRL's trainer always computes its loss in chunks; use --loss chunked or --trainer hf",
    (Trainer.TRL, Loss.CCE): "TRL has no cut cross-entropy; use --loss chunked or --trainer axolotl",
}
_IN_16_BITS = (Compute.BF16, Compute.BF16_AUTOCAST, Compute.FP16, Compute.FP16_AUTOCAST, Compute.FP8_AUTOCAST)


def _head_refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What the loss asks of the trainer, the model, the device and the precision."""
    training, device = scenario.training, cluster.gpu.device_kind
    loss = training.loss
    if (training.trainer, loss) in _WITHOUT_LOSS:
        return _WITHOUT_LOSS[training.trainer, loss]
    if loss is Loss.PLAIN:
        return None
    if profile.task != "causal-lm":
        return f"--loss {loss} is for causal language models, not for {profile.task}; use --loss plain --trainer hf"
    if loss is Loss.CHUNKED:
        return None
    if device is DeviceKind.CPU:
        return f"--loss {loss} is made of kernels for GPUs; use --loss plain on a CPU"
    compute = trace_key(training, scenario.strategy, device).compute
    if loss is Loss.CCE and compute not in _IN_16_BITS:
        return (
            f"cut cross-entropy takes 16-bit weights, and --precision {training.precision} with "
            f"{scenario.strategy.name} holds them in fp32; use --precision bf16-params"
        )
    return None


def _engine_refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    return engine(scenario.strategy.kind).refusal(scenario, profile, cluster)


def _hardware_refusal(scenario: Scenario, cluster: Cluster) -> str | None:
    gpu, precision = cluster.gpu, scenario.training.precision
    if gpu.device_kind is DeviceKind.CPU:
        return None
    if precision in (Precision.BF16, Precision.BF16_PARAMS, Precision.BF16_PURE) and not gpu.supports_bf16:
        return f"{gpu.name} has no bf16; use --precision fp16"
    return None


def _runs_flash(attention: Attention, gpu: Gpu) -> bool:
    """FlashAttention 2 from Ampere on; FlashAttention 3 on Hopper, whose kernels are the ones that are known here.

    Source: flash-attention's README; ``hopper/setup.py`` (``sm_90a``, and kernels for Ampere that are not described).
    """
    if attention is Attention.FLASH_ATTENTION_3:
        return gpu.backend is Backend.CUDA and gpu.compute_capability[0] == 9
    return gpu.device_kind is not DeviceKind.CPU and gpu.compute_capability >= (8, 0)


def _model_refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    training = scenario.training
    if training.method is Method.QLORA and profile.quantises_head:
        return (
            f"bitsandbytes quantises the classifier of {profile.name} too, which PEFT then cannot train; "
            "use --method lora"
        )
    if training.attention.is_flash:
        if not _runs_flash(training.attention, cluster.gpu):
            return f"{training.attention} does not run on {cluster.text}; use --attention sdpa"
        if training.precision is Precision.FP32:
            return f"{training.attention} does not take fp32; use --precision bf16 or --attention sdpa"
    elif training.attention not in profile.attentions:
        offered = " or ".join(profile.attentions)
        return f"{profile.name} has no {training.attention} attention; use --attention {offered}"
    return None
