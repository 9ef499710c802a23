"""What a trainer holds of other batches while it computes on one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchkit.program import Owner, Persistent, Size
from launchkit.scenario import DeviceKind, Trainer
from launchkit.strategies import with_batches_ahead
from tests.builders import scenario
from tests.strategies.small import program


@pytest.mark.parametrize(
    ("trainer", "steps", "device", "num_batches"),
    [
        (Trainer.LOOP, 4, DeviceKind.CPU, 1),
        (Trainer.HF, 1, DeviceKind.CUDA, 1),
        (Trainer.HF, 4, DeviceKind.CUDA, 4),
        (Trainer.TRL, 1, DeviceKind.CPU, 2),
        (Trainer.HF, 4, DeviceKind.CPU, 5),
    ],
)
def test_the_trainer_takes_a_steps_batches_at_once(
    trainer: Trainer, steps: int, device: DeviceKind, num_batches: int
) -> None:
    weight, batch = Persistent(Size.constant(100), Owner.WEIGHTS, 3), Persistent(Size.constant(16), Owner.INPUTS, 2)
    step = replace(program(), persistent=(weight, batch))
    found = with_batches_ahead(step, scenario(trainer=trainer, gradient_accumulation_steps=steps), device).persistent
    assert found == (weight, batch._replace(count=2 * num_batches))
