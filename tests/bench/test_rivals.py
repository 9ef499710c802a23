"""What the other tools say, where that needs none of them installed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.accuracy.cell import Cell
from bench.accuracy.rivals import (
    Job,
    Shape,
    _mlp_linears,
    _optimizer_bytes,
    accelerate_estimate,
    ask,
    deepspeed_estimate,
    eleuther_estimate,
    job_of_cell,
    llm_analysis_estimate,
)

JOB = Job(
    config="{}",
    num_gpus=1,
    strategy="single",
    method="full",
    precision="bf16",
    optimizer="adamw_torch",
    micro_batch=4,
    seq_len=4096,
    checkpointing="full",
    attention="sdpa",
)
MISTRAL = Shape(
    num_parameters=7_241_732_096,
    largest_layer_parameters=131_072_000,
    backbone_bytes=28_442_640_896,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    intermediate_size=14336,
    num_mlp_linears=3,
    vocab_size=32000,
)
LLAMA = replace(MISTRAL, num_kv_heads=32, intermediate_size=11008)
BERT = replace(
    MISTRAL,
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    num_kv_heads=16,
    intermediate_size=4096,
    num_mlp_linears=2,
    vocab_size=30522,
)


@pytest.mark.parametrize(
    ("shape", "fields", "gib"),
    [
        (MISTRAL, {"precision": "bf16-pure"}, 176.17),
        (replace(MISTRAL, num_experts=8), {"precision": "bf16-pure"}, 764.17),
        (LLAMA, {"strategy": "zero3", "num_gpus": 8, "micro_batch": 2, "checkpointing": "none"}, 210.95),
        (LLAMA, {"strategy": "zero2", "num_gpus": 8, "micro_batch": 1}, 43.10),
        (BERT, {"precision": "fp32", "seq_len": 512, "checkpointing": "none"}, 13.27),
    ],
)
def test_eleuther_says_what_its_script_prints(shape: Shape, fields: dict[str, Any], gib: float) -> None:
    """Expected: the script's own *Per-GPU Memory Required for Training* for the same arguments."""
    said = eleuther_estimate(replace(JOB, **fields), shape)
    assert said is not None and round(said / 2**30, 2) == gib


def test_eleuther_is_spared_deepspeeds_buckets_under_fsdp() -> None:
    sharded = replace(JOB, num_gpus=8)
    zero, fsdp = (eleuther_estimate(replace(sharded, strategy=name), LLAMA) for name in ("zero3", "fsdp2"))
    assert zero is not None and fsdp is not None
    assert zero - fsdp == 2 * 1_500_000_000


@pytest.mark.parametrize(
    ("tool", "fields"),
    [
        (accelerate_estimate, {"strategy": "fsdp2", "num_gpus": 8}),
        (accelerate_estimate, {"optimizer": "adafactor"}),
        (deepspeed_estimate, {"strategy": "fsdp2", "num_gpus": 8}),
        (deepspeed_estimate, {"strategy": "zero1", "num_gpus": 8}),
        (deepspeed_estimate, {"strategy": "zero2", "num_gpus": 8, "offload": "all"}),
        (deepspeed_estimate, {"strategy": "zero3", "num_gpus": 8, "precision": "fp32"}),
        (eleuther_estimate, {"strategy": "hsdp", "num_gpus": 8}),
        (eleuther_estimate, {"strategy": "zero3", "num_gpus": 8, "offload": "optimizer"}),
        (llm_analysis_estimate, {"precision": "fp32"}),
        (llm_analysis_estimate, {"optimizer": "sgd"}),
    ],
)
def test_a_tool_says_nothing_of_what_it_does_not_know(tool: Any, fields: dict[str, Any]) -> None:
    assert tool(replace(JOB, **fields), MISTRAL) is None


@pytest.mark.parametrize("tool", [eleuther_estimate, llm_analysis_estimate])
def test_formulas_of_attention_blocks_are_asked_of_nothing_else(tool: Any) -> None:
    assert tool(JOB, replace(MISTRAL, num_heads=0)) is None


def test_eleuther_is_told_the_cells_buckets() -> None:
    settings = {"stage3_prefetch_bucket_size": 100_000, "stage3_max_live_parameters": 300_000}
    cell = Cell(name="cell", config={}, strategy="zero3", num_processes=2, precision="bf16", zero=settings)
    job = job_of_cell(cell)
    default = job_of_cell(replace(cell, zero={"stage3_max_live_parameters": "auto"}))
    small, large = eleuther_estimate(job, LLAMA), eleuther_estimate(default, LLAMA)
    assert small is not None and large is not None
    assert large - small == 2 * (1_500_000_000 - 400_000)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_none_knows_adapters(method: str) -> None:
    assert ask(replace(JOB, method=method)) == {}


@pytest.mark.parametrize(
    ("precision", "optimizer", "gradient_bytes", "state_bytes"),
    [
        ("bf16", "adamw_torch", 4, 12),
        ("bf16", "adamw_bnb_8bit", 4, 6),
        ("bf16-pure", "adamw_torch", 2, 4),
        ("bf16-params", "adamw_bnb_8bit", 2, 2),
    ],
)
def test_llm_analysis_is_told_the_states_that_there_are(
    precision: str, optimizer: str, gradient_bytes: int, state_bytes: int
) -> None:
    told = _optimizer_bytes(replace(JOB, precision=precision, optimizer=optimizer))
    assert told["master_weights_dtype_bytes"] == gradient_bytes
    assert sum(told.values()) == state_bytes


@pytest.mark.parametrize(
    ("shape", "num_linears"),
    [((14336, 4096), 1), ((4096, 14336), 1), ((28672, 4096), 2), ((4096, 4096), 0), ((32000, 4096), 0)],
)
def test_linears_of_the_mlp_are_known_by_their_sizes(shape: tuple[int, int], num_linears: int) -> None:
    assert _mlp_linears(shape, hidden_size=4096, intermediate_size=14336) == num_linears
