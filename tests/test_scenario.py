"""Which program of a model serves a key, and what a scenario's settings imply."""

from __future__ import annotations

from typing import Any

import pytest

from launchkit.scenario import (
    Attention,
    Checkpointing,
    Compute,
    DeviceKind,
    Loss,
    Method,
    StrategyKind,
    TraceKey,
    Trainer,
)
from tests.builders import scenario


def key(**overrides: Any) -> TraceKey:
    values: dict[str, Any] = {
        "device": DeviceKind.CUDA,
        "method": Method.FULL,
        "compute": Compute.AUTOCAST_BF16,
        "checkpointing": Checkpointing.FULL,
        "attention": Attention.SDPA,
        "loss": Loss.PLAIN,
        "trainer": Trainer.LOOP,
    }
    return TraceKey(**(values | overrides))


AXOLOTL_LIGER = {"trainer": Trainer.AXOLOTL, "loss": Loss.LIGER}


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ({}, {}),
        ({"trainer": Trainer.HF}, {"trainer": Trainer.HF}),  # accelerate widens the logits of an autocast forward
        ({"trainer": Trainer.AXOLOTL}, {"trainer": Trainer.HF}),
        ({"trainer": Trainer.HF, "compute": Compute.BF16}, {"compute": Compute.BF16}),
        ({"trainer": Trainer.TRL}, {"trainer": Trainer.TRL, "loss": Loss.CHUNKED}),
        (
            {"trainer": Trainer.TRL, "compute": Compute.BF16},
            {"trainer": Trainer.TRL, "loss": Loss.CHUNKED, "compute": Compute.BF16},
        ),
        ({"trainer": Trainer.TRL, "loss": Loss.LIGER}, {"trainer": Trainer.TRL, "loss": Loss.LIGER}),
        ({"trainer": Trainer.HF, "loss": Loss.LIGER}, {"loss": Loss.LIGER}),
        (AXOLOTL_LIGER, AXOLOTL_LIGER),  # the loss without the layer kernels
        ({"trainer": Trainer.AXOLOTL, "loss": Loss.CCE}, {"loss": Loss.CCE}),
        ({"evaluation": True}, {"evaluation": True, "checkpointing": Checkpointing.NONE}),
        ({"packed": True}, {"packed": True}),
        ({"packed": True, "attention": Attention.FLASH_ATTENTION_2}, {}),
    ],
)
def test_what_serves(asked: dict[str, Any], served: dict[str, Any]) -> None:
    canonical = key(**asked).canonical
    assert canonical == key(**served)
    assert canonical.canonical == canonical


def test_names_of_programs_that_ship_do_not_change() -> None:
    assert key().text == "cuda/full/autocast-bf16/full/sdpa/plain/loop/bn"
    assert key(evaluation=True, packed=True).text == f"{key().text}/evaluation/packed"


@pytest.mark.parametrize(
    ("training", "kind", "expected"),
    [
        ({"checkpointing": "reentrant"}, "single", True),
        ({"checkpointing": "full"}, "zero3", False),
        ({"checkpointing": "full", "method": "qlora"}, "zero3", True),
        ({"checkpointing": "full", "method": "qlora"}, "ddp", False),
        ({"checkpointing": "none", "method": "qlora"}, "zero3", False),
        ({"checkpointing": "full", "method": "lora"}, "zero3", False),
        ({"checkpointing": "full", "method": "lora", "trainer": "trl"}, "zero3", True),
        ({"checkpointing": "full", "method": "lora", "trainer": "trl"}, "zero2", False),
    ],
)
def test_whose_checkpoints_are_re_entered(training: dict[str, Any], kind: str, expected: bool) -> None:
    """Asked for, or under ZeRO-3 what gathering or TRL does not leave a choice."""
    assert scenario(strategy=kind, **training).training.reenters(StrategyKind(kind)) is expected
