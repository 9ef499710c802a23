"""Valid values of the central nouns, varied by keyword: ``candidate(strategy="fsdp2", seq_len=4096)``.

A keyword of ``scenario`` and ``candidate`` is a field of ``Training``, ``Batch``, ``Strategy``, ``FsdpSettings``,
``ZeroSettings`` or ``DdpSettings``; ``strategy`` is the kind. Text stands for the members of the enumerations.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from launchkit.hardware import Backend, Cluster, Gpu, Node
from launchkit.model import ModelProfile
from launchkit.plan import Candidate, Estimate, Plan, StepTime
from launchkit.program import FreeAll, Owner, Phase, Section, Stage, StepProgram
from launchkit.scenario import (
    Attention,
    BackwardPrefetch,
    Batch,
    Checkpointing,
    CommHook,
    DdpSettings,
    Fp8Backend,
    FsdpSettings,
    Loss,
    Method,
    Offload,
    Precision,
    Scenario,
    Sharding,
    Split,
    State,
    Strategy,
    StrategyKind,
    Trainer,
    Training,
    Wrap,
    ZeroSettings,
)
from launchkit.units import GIB

_ENUMS = {
    "wrap": Wrap,
    "comm_hook": CommHook,
    "backward_prefetch": BackwardPrefetch,
    "method": Method,
    "precision": Precision,
    "fp8_backend": Fp8Backend,
    "checkpointing": Checkpointing,
    "attention": Attention,
    "loss": Loss,
    "trainer": Trainer,
    "state": State,
    "strategy": StrategyKind,
    "offload": Offload,
    "sharding": Sharding,
}


def gpu(**overrides: Any) -> Gpu:
    """A GPU much like an RTX 4090; ``backend="cpu"`` drops what a CPU has not."""
    values: dict[str, Any] = {
        "name": "RTX 4090",
        "architecture": "ada",
        "compute_capability": (8, 9),
        "memory_bytes": 24 * GIB,
        "memory_bandwidth_bytes_per_s": 1008e9,
        "fp32_flops_per_s": 82.6e12,
        "tf32_flops_per_s": 82.6e12,
        "fp16_flops_per_s": 165.2e12,
        "bf16_flops_per_s": 165.2e12,
        "pcie_bytes_per_s": 32e9,
        "source": "tests",
    }
    if "backend" in overrides:
        overrides["backend"] = Backend(overrides["backend"])
    if overrides.get("backend") is Backend.CPU:
        values |= {"name": "CPU", "architecture": "", "compute_capability": (0, 0), "tf32_flops_per_s": 0.0}
    return Gpu(**(values | overrides))


def cluster(*, num_gpus: int = 4, num_nodes: int = 1, **overrides: Any) -> Cluster:
    """``num_nodes`` nodes of ``num_gpus`` GPUs each; other keywords are fields of ``Gpu``."""
    node = Node(num_gpus=num_gpus, gpu_link_bytes_per_s=32e9, host_memory_bytes=256 * GIB, num_cpu_cores=32)
    return Cluster(gpu=gpu(**overrides), node=node, num_nodes=num_nodes, network_bytes_per_s=25e9)


def profile(**overrides: Any) -> ModelProfile:
    """A model profile much like Llama-3.1-8B's."""
    values: dict[str, Any] = {
        "name": "meta-llama/Llama-3.1-8B",
        "source": "catalogue",
        "fingerprint": "0" * 16,
        "model_type": "llama",
        "architecture": "LlamaForCausalLM",
        "num_parameters": 8_030_261_248,
        "hidden_size": 4096,
        "num_layers": 32,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "block_classes": ("LlamaDecoderLayer",),
        "attentions": tuple(Attention),
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    return ModelProfile(**(values | overrides))


def smallest_program() -> StepProgram:
    """A step that allocates nothing."""
    return StepProgram(
        stages=(Stage(name="forward.0", phase=Phase.FORWARD, layers=(0,)),),
        sections=(Section(events=(FreeAll(Owner.GRADIENTS),)),),
        groups={},
        group_counts={},
    )


def scenario(**overrides: Any) -> Scenario:
    """A scenario with every field at its default but those named."""
    given = {name: _ENUMS[name](value) if name in _ENUMS else value for name, value in overrides.items()}
    kind = given.pop("strategy", StrategyKind.SINGLE)
    settings = {"ddp": DdpSettings, "fsdp": FsdpSettings, "zero": ZeroSettings}
    engines = {name: settings_type(**_taken(given, settings_type)) for name, settings_type in settings.items()}
    built = Scenario(
        training=Training(**_taken(given, Training)),
        strategy=Strategy(
            kind=kind, split=given.pop("split", Split()), offload=given.pop("offload", Offload.NONE), **engines
        ),
        batch=Batch(**_taken(given, Batch)),
        state=given.pop("state", State.STEADY),
    )
    if given:
        raise TypeError(f"no field of a scenario: {', '.join(given)}")
    return built


def estimate(**overrides: Any) -> Estimate:
    """An estimate that fits; ``at_peak`` sums as it must."""
    values: dict[str, Any] = {
        "allocated_peak_bytes": 18 * GIB,
        "reserved_peak_bytes": 19 * GIB,
        "device_peak_bytes": 20 * GIB,
        "device_peak_low_bytes": 19 * GIB,
        "device_peak_high_bytes": 21 * GIB,
        "device_usable_bytes": 23 * GIB,
        "peak_phase": "loss",
        "peak_stage": "head",
        "at_peak": {"weights": 8 * GIB, "activations": 10 * GIB, "cuda_context": GIB, "nccl": 0, "fragmentation": GIB},
        "steady_bytes": 9 * GIB,
        "host_peak_bytes": 8 * GIB,
        "host_load_peak_bytes": 16 * GIB,
        "checkpoint_bytes": GIB,
    }
    return Estimate(**(values | overrides))


def step_time(**overrides: Any) -> StepTime:
    values: dict[str, Any] = {
        "seconds": 2.0,
        "compute_seconds": 1.8,
        "exposed_communication_seconds": 0.2,
        "tokens_per_second_per_gpu": 1024.0,
        "mfu": 0.4,
    }
    return StepTime(**(values | overrides))


def candidate(*, model: ModelProfile | None = None, **overrides: Any) -> Candidate:
    """A candidate; keywords as for ``scenario``."""
    model = model or profile()
    built = scenario(**overrides)
    is_full = built.training.method is Method.FULL
    return Candidate(
        model=model,
        num_parameters=model.num_parameters,
        num_trainable=model.num_parameters if is_full else 41_943_040,
        scenario=built,
        estimate=estimate(),
        step=step_time(),
    )


def plan(*, chosen: Candidate | None = None, **overrides: Any) -> Plan:
    """A plan that chose ``chosen``, by default FSDP2 on four GPUs; ``plan(chosen=None, fits=False)`` chose nothing."""
    fits = overrides.pop("fits", True)
    picked = chosen or (candidate(strategy="fsdp2") if fits else None)
    model = picked.model if picked else profile()
    built = Plan(request={"gpus": "4x4090"}, model=model, cluster=cluster(), chosen=picked, num_considered=1)
    return replace(built, **overrides)


def _taken(given: dict[str, Any], settings_type: type[Any]) -> dict[str, Any]:
    """The fields of ``settings_type`` among ``given``, taken out of it."""
    names = [field.name for field in fields(settings_type) if field.name in given]
    return {name: given.pop(name) for name in names}
