"""How a published run becomes rows of ``published.json``."""

from __future__ import annotations

from typing import Any

import pytest

from bench.accuracy.published import CONTRADICTORY, NVIDIA_SMI, compare
from bench.accuracy.rows import Row

RUN: dict[str, Any] = {
    "id": "run",
    "source": "a paper",
    "source_group": "litgpt",
    "bench": ["a", "core"],
    "confidence": "high",
    "model": "TinyLlama/TinyLlama-1.1B",
    "gpu": "A100-SXM4-40GB",
    "n_gpus": 1,
    "strategy": "single",
    "offload": "none",
    "precision": "bf16_pure",
    "optimizer": "adamw_torch",
    "micro_batch": 1,
    "grad_accum": 1,
    "seq_len": 2048,
    "checkpointing": "full",
    "attn": "sdpa",
    "compile": False,
    "lora": None,
    "quant": None,
    "method": "full",
    "loss_impl": None,
    "metric_class": "allocated",
    "measured_kind": "torch max_memory_allocated",
    "peak_gib": 11.0,
    "alt_peaks_gib": None,
}


def rows(**fields: Any) -> tuple[Row, ...]:
    return compare(RUN | fields)


def test_a_run_is_predicted_in_its_metric() -> None:
    (row,) = rows()
    assert (row.id, row.metric, row.bench, row.habits, row.skipped) == ("run", "allocated", "a", (), "")
    assert row.low_bytes < row.predicted_bytes < row.high_bytes


def test_what_the_driver_showed_is_a_row_of_its_own() -> None:
    row, device = rows(alt_peaks_gib={NVIDIA_SMI: 14.0})
    assert (device.id, device.metric, device.flags) == ("run-device", "device", row.flags)
    assert device.measured_bytes == 14 * 2**30
    assert device.predicted_bytes > row.predicted_bytes, "the context and the cache come on top"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"micro_batch": None}, "not stated: micro-batch or length"),
        ({"quant": "gptq-int4"}, "weights: gptq-int4"),
        ({"model": "nobody/has-this"}, "model: nobody/has-this, not in the catalogue"),
        ({"id": "gist-zero-11"}, CONTRADICTORY["gist-zero-11"]),
        ({"optimizer": "adam (DeepSpeedCPUAdam)", "offload": "optimizer cpu"}, "refused: "),
    ],
)
def test_a_run_that_cannot_be_said_has_a_reason(fields: dict[str, Any], reason: str) -> None:
    (row,) = rows(**fields)
    assert row.skipped.startswith(reason)
