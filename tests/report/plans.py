"""Plans for the screens: one chosen candidate with its neighbours, varied by keyword."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launchkit.hardware import Backend, Cluster, Gpu, Node
from launchkit.model import ModelProfile
from launchkit.plan import Candidate, Estimate, Plan, Rejected, StepTime, Suggestion
from launchkit.scenario import (
    Attention,
    Batch,
    Checkpointing,
    Method,
    Offload,
    Scenario,
    Strategy,
    StrategyKind,
    Training,
)
from launchkit.units import GB, GIB, MIB

MODEL = ModelProfile(
    name="Qwen/Qwen3-8B",
    source="catalogue",
    fingerprint="0" * 16,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    num_parameters=8_190_735_360,
    hidden_size=4096,
    num_layers=36,
    vocab_size=151_936,
    max_position_embeddings=40_960,
    block_classes=("Qwen3DecoderLayer",),
    attentions=(Attention.EAGER, Attention.SDPA),
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
)
RTX_4090 = Gpu(name="RTX 4090", compute_capability=(8, 9), memory_bytes=24_564 * MIB, bf16_flops_per_s=165.2e12)
CPU = Gpu(name="CPU", backend=Backend.CPU, memory_bytes=16 * GIB)
CLUSTER = Cluster(gpu=RTX_4090, node=Node(num_gpus=2, gpu_link_bytes_per_s=25e9, host_memory_bytes=128 * GIB))
LORA = Training(method=Method.LORA)


def estimate(peak_gib: float = 20.9, *, spread: float = 0.03, usable_gib: float = 23.5) -> Estimate:
    peak = round(peak_gib * GIB)
    shares = {
        "weights": 0.37,
        "gathered_weights": 0.04,
        "master_weights": 0.0,
        "gradients": 0.005,
        "optimizer_states": 0.01,
        "activations": 0.195,
        "logits": 0.275,
        "temporaries": 0.0,
        "communication": 0.0,
        "inputs": 0.0,
        "cuda_context": 0.02,
        "nccl": 0.04,
        "fragmentation": 0.045,
    }
    at_peak = {name: round(peak * share) for name, share in shares.items()}
    overheads = sum(at_peak[name] for name in ("cuda_context", "nccl", "fragmentation"))
    return Estimate(
        allocated_peak_bytes=sum(at_peak.values()) - overheads,
        reserved_peak_bytes=sum(at_peak.values()) - at_peak["cuda_context"] - at_peak["nccl"],
        device_peak_bytes=peak,
        device_peak_low_bytes=round(peak * (1 - spread)),
        device_peak_high_bytes=round(peak * (1 + spread)),
        device_usable_bytes=round(usable_gib * GIB),
        peak_phase="loss",
        peak_stage="forward.1",
        at_peak=at_peak,
        steady_bytes=round(peak * 0.4),
        host_peak_bytes=21 * GIB,
        host_load_peak_bytes=38 * GIB,
        checkpoint_bytes=round(0.2 * GB),
    )


def scenario(kind: StrategyKind = StrategyKind.FSDP2, *, training: Training = LORA, **batch: int) -> Scenario:
    return Scenario(
        training=training,
        strategy=Strategy(kind=kind),
        batch=Batch(**{"micro_batch": 1, "gradient_accumulation_steps": 16, "seq_len": 4096, **batch}),
    )


def candidate(*, of: Scenario | None = None, peak_gib: float = 20.9, seconds: float = 9.3, **changes: Any) -> Candidate:
    values: dict[str, Any] = {
        "model": MODEL,
        "num_parameters": MODEL.num_parameters,
        "num_trainable": 43_646_976,
        "scenario": of or scenario(),
        "estimate": estimate(peak_gib),
        "step": StepTime(
            seconds=seconds,
            compute_seconds=seconds * 0.8,
            exposed_communication_seconds=seconds * 0.2,
            tokens_per_second_per_gpu=65_536 / seconds,
            mfu=0.41,
        ),
    }
    return Candidate(**{**values, **changes})


def rejected() -> tuple[Rejected, ...]:
    full = scenario(StrategyKind.ZERO3, training=Training())
    return (
        Rejected(candidate=candidate(of=full, peak_gib=61.0), reason="optimizer states 24.0 GiB"),
        Rejected(candidate=candidate(of=scenario(StrategyKind.DDP), peak_gib=29.2), reason="weights not sharded"),
    )


def plan(**changes: Any) -> Plan:
    qlora = scenario(StrategyKind.DDP, training=replace(LORA, method=Method.QLORA))
    values: dict[str, Any] = {
        "request": {"gpus": "2x4090", "seq_len": 4096},
        "model": MODEL,
        "cluster": CLUSTER,
        "chosen": candidate(),
        "alternatives": (
            candidate(of=qlora, peak_gib=14.8, seconds=12.6),
            candidate(of=scenario(StrategyKind.ZERO3), peak_gib=21.4, seconds=9.9),
        ),
        "rejected": rejected(),
        "suggestions": (
            Suggestion(flags="--checkpointing full", saved_bytes=round(3.2 * GIB), time_factor=1.22),
            Suggestion(flags="--loss chunked", saved_bytes=round(5.1 * GIB), time_factor=1.0),
        ),
        "assumptions": ("SDPA flash attention", "plain cross-entropy", "fused AdamW"),
        "num_considered": 212,
        "versions": {"launchkit": "0.1.0"},
    }
    return Plan(**{**values, **changes})


def nothing_fits() -> Plan:
    return plan(
        chosen=None,
        alternatives=(),
        suggestions=(Suggestion(flags="--method qlora --checkpointing full", saved_bytes=9 * GIB, time_factor=1.4),),
    )


def small_cpu_candidate() -> Candidate:
    """Below one GiB, on CPU processes, offloaded and checkpointed: the other half of every branch."""
    point = Scenario(
        training=Training(checkpointing=Checkpointing.FULL),
        strategy=Strategy(kind=StrategyKind.ZERO2, offload=Offload.OPTIMIZER),
        batch=Batch(micro_batch=2, seq_len=64),
    )
    return candidate(
        of=point, estimate=estimate(0.5, spread=0.0, usable_gib=15.0), step=replace(candidate().step, seconds=0.0)
    )


CPU_CLUSTER = Cluster(gpu=CPU, node=Node(num_gpus=2, gpu_link_bytes_per_s=5e9))
