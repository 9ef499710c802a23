"""The scenarios that every exporter is tried on: each strategy, with each offload and method that it allows."""

from __future__ import annotations

from typing import Any, NamedTuple

from launchkit.hardware import Cluster
from launchkit.plan import Candidate
from launchkit.scenario import Split
from launchkit.units import MIB
from tests.builders import candidate, cluster

_STRATEGIES: tuple[tuple[str, tuple[str, ...], int], ...] = (
    # kind, its offloads, nodes of four GPUs
    ("single", ("none",), 1),
    ("ddp", ("none",), 1),
    ("fsdp", ("none", "params"), 1),
    ("fsdp2", ("none", "params"), 1),
    ("hsdp", ("none", "params"), 2),
    ("zero1", ("none", "optimizer"), 1),
    ("zero2", ("none", "optimizer"), 1),
    ("zero3", ("none", "optimizer", "params", "all", "nvme"), 1),
)


class Case(NamedTuple):
    name: str
    candidate: Candidate
    cluster: Cluster


def case(name: str, *, num_gpus: int = 4, num_nodes: int = 1, backend: str = "cuda", **overrides: Any) -> Case:
    values = {"micro_batch": 2, "gradient_accumulation_steps": 4, "seq_len": 4096} | overrides
    return Case(name, candidate(**values), cluster(num_gpus=num_gpus, num_nodes=num_nodes, backend=backend))


def strategy_cases() -> list[Case]:
    """Every strategy × its offloads × method, with full checkpointing."""
    return [
        case(
            f"{kind}-{offload}-{method}",
            num_nodes=num_nodes,
            strategy=kind,
            offload=offload,
            method=method,
            checkpointing="full",
            nvme_path="/mnt/nvme" if offload == "nvme" else "",
        )
        for kind, offloads, num_nodes in _STRATEGIES
        for offload in offloads
        for method in ("full", "lora", "qlora")
    ]


GOLDEN = [
    case("single-qlora", num_gpus=1, strategy="single", method="qlora", checkpointing="full"),
    case(
        "single-dora-selective",
        num_gpus=1,
        strategy="single",
        method="lora",
        dora=True,
        lora_targets="q_proj,experts.down_proj",
        lora_modules_to_save="lm_head",
        checkpointing="selective",
    ),
    case("ddp-rslora-offload", strategy="ddp", method="lora", rslora=True, checkpointing="offload"),
    case("ddp-lora-2-nodes", strategy="ddp", method="lora", lora_targets="attention", num_nodes=2),
    case("fsdp1-shard-grad-op", strategy="fsdp", sharding="shard_grad_op", checkpointing="full"),
    case("fsdp2-full", strategy="fsdp2", checkpointing="full", loss="liger"),
    case("ddp-settings", strategy="ddp", bucket_cap_bytes=50 * MIB, find_unused_parameters=True, loss="chunked"),
    case("ddp-static-graph", strategy="ddp", static_graph=True, loss="chunked"),
    case("fsdp1-settings", strategy="fsdp", backward_prefetch="post", forward_prefetch=True, use_orig_params=False),
    case("fsdp1-no-wrap", strategy="fsdp", wrap="model", checkpointing="full"),
    case("ddp-fp8", strategy="ddp", precision="fp8"),
    case("ddp-fp8-te", strategy="ddp", precision="fp8", fp8_backend="te"),
    case("fsdp2-fp8", strategy="fsdp2", precision="fp8", checkpointing="full", compile=True),
    case("fsdp2-qlora-offload", strategy="fsdp2", method="qlora", offload="params", checkpointing="full"),
    case("hsdp-2-nodes", strategy="hsdp", num_nodes=2, checkpointing="full"),
    case("zero2-offload", strategy="zero2", offload="optimizer", checkpointing="full"),
    case("zero3-nvme-loop", strategy="zero3", offload="nvme", nvme_path="/mnt/nvme", trainer="loop"),
    case("zero3-fp16", strategy="zero3", precision="fp16", loss="chunked"),
    case("zero2-cpu", strategy="zero2", num_gpus=2, backend="cpu", precision="fp32", trainer="loop"),
    case("tp", strategy="single", split=Split(tp=4)),
    case("tp-lora", strategy="single", split=Split(tp=4), method="lora"),
    case("fsdp2-tp", strategy="fsdp2", split=Split(tp=2), checkpointing="full"),
    case("fsdp2-cp-offload", strategy="fsdp2", split=Split(cp=2), offload="params", checkpointing="full"),
    case("hsdp-cp", strategy="hsdp", split=Split(cp=2), num_nodes=2, checkpointing="full"),
    case("zero3-sp", strategy="zero3", split=Split(sp=4), checkpointing="full", trainer="loop"),
    case("ddp-cpu", strategy="ddp", num_gpus=2, backend="cpu", precision="fp32", trainer="hf"),
]


def axolotl_cases() -> list[Case]:
    """``strategy_cases``, and every optimizer, loss, precision, attention and checkpointing on some strategies."""
    variations: tuple[dict[str, Any], ...] = (
        *({"loss": loss} for loss in ("plain", "chunked", "liger", "cce")),
        *(
            {"optimizer": name}
            for name in ("adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "sgd", "lion_32bit", "muon")
        ),
        *({"precision": name} for name in ("fp32", "fp16", "bf16-params", "bf16-pure", "fp8")),
        *({"attention": name} for name in ("eager", "sdpa", "flash_attention_2", "flash_attention_3")),
        *({"checkpointing": name} for name in ("none", "full", "selective")),
        {"packing": True, "attention": "flash_attention_2"},
        {"packing": True, "attention": "flash_attention_3"},
        {"compile": True},
        {"method": "lora", "lora_targets": "attention"},
        {"method": "lora", "lora_targets": "q_proj,v_proj", "lora_rank": 64},
    )
    varied = [
        case(f"{kind}-{'-'.join(map(str, values.values()))}", strategy=kind, **values)
        for kind in ("ddp", "fsdp", "fsdp2", "zero2", "zero3")
        for values in variations
    ]
    return [*strategy_cases(), *varied]
