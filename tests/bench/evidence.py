"""Made-up evidence for the tests of the accuracy page."""

from __future__ import annotations

from typing import Any

from bench.accuracy.rows import Comparison, Row

GIB = 2**30
FLAGS: dict[str, Any] = {
    "model": "org/model",
    "gpus": "1xA100-80GB",
    "strategy": "single",
    "offload": "none",
    "method": "full",
    "precision": "bf16",
    "optimizer": "adamw_torch",
    "micro_batch": 4,
    "seq_len": 512,
    "checkpointing": "none",
    "attention": "sdpa",
    "loss": "plain",
}


def row(**fields: Any) -> Row:
    """A published run of 10 GiB that is predicted exactly, with ``fields`` of its own."""
    known: dict[str, Any] = {
        "id": "run",
        "source": "paper",
        "group": "transformers",
        "bench": "a",
        "confidence": "high",
        "metric": "allocated",
        "measured_bytes": 10 * GIB,
        "predicted_bytes": 10 * GIB,
        "low_bytes": 9 * GIB,
        "high_bytes": 11 * GIB,
        "fits": True,
        "may_fit": True,
    }
    return Row(**known | {"flags": FLAGS} | fields)


def comparison(measured: int = 100, predicted: int = 100, **fields: Any) -> Comparison:
    known: dict[str, Any] = {"id": "run", "kind": "a", "measured_low_bytes": measured, "measured_high_bytes": measured}
    return Comparison(**known | {"predicted_bytes": predicted} | fields)
