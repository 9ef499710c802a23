"""A model that takes images of any size has a program for each batch, which any machine may keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from launchkit.model import ModelProfile
from launchkit.planner.evaluate import Bench
from launchkit.planner.point import point_of
from launchkit.request import Request, resolve
from launchkit.scenario import TraceKey
from tests.builders import cluster
from tests.planner.sources import WrittenSource


@dataclass
class Seeing(WrittenSource):
    model_type: str = "qwen2_5_vl"

    @property
    def profile(self) -> ModelProfile:
        return replace(super().profile, model_type=self.model_type)


def key_of(source: Seeing, *, evaluation: bool = False, **flags: Any) -> tuple[TraceKey, Any]:
    gpus = cluster()
    scenario = resolve(Request.from_flags(flags), model=source.profile, cluster=gpus).scenario
    bench = Bench(source=source, cluster=gpus, asks_kernels=True)
    return bench.evaluation_key(scenario) if evaluation else bench.key(scenario), point_of(scenario)


@pytest.mark.parametrize("evaluation", [False, True])
def test_each_batch_has_a_program(evaluation: bool) -> None:
    key, point = key_of(Seeing(), evaluation=evaluation, images=True, micro_batch=3, method="lora")
    assert key.at == point == (3, 2048, 16)
    assert not key.asks_kernels
    assert key.image_size == "1024x1024"
    assert "images1024x1024" in key.text and "3x2048x16" in key.text


def test_text_and_images_of_one_size_have_one_for_all() -> None:
    assert key_of(Seeing(), micro_batch=3)[0].at is None
    assert key_of(Seeing(model_type="gemma3"), images=True, micro_batch=3)[0].at is None
