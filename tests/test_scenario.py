"""Which program of a model serves a key: one where the step is the same, another where it is not."""

from __future__ import annotations

from typing import Any

import pytest

from launchkit.scenario import Attention, Checkpointing, Compute, DeviceKind, Loss, Method, TraceKey, Trainer


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
