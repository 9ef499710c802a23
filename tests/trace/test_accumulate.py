"""Gradients of one tensor meet in a trace as they do in torch's engine: in place where nothing else holds the first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from launchkit.trace.recorder import StepRecorder

Step = Callable[[torch.Tensor], None]


def two_uses(x: torch.Tensor) -> None:
    h = x * 1
    (h.sin() + h.cos()).sum().backward()


def residual(x: torch.Tensor) -> None:
    h = x * 1
    (h + h.sin()).mul(2).sum().backward()


def held_by_a_hook(x: torch.Tensor) -> None:
    h, kept = x * 1, []
    z, other = h.sin(), h * 1
    z.register_hook(kept.append)
    other.register_hook(kept.append)
    (h + z + other).mul(2).sum().backward()


def expanded(x: torch.Tensor) -> None:
    h = x * 1
    (h.sum() + h.sin().sum()).backward()


def sliced(x: torch.Tensor) -> None:
    h = x * 1
    torch.stack([h[:, i].sin() for i in range(3)]).sum().backward()


def traced(step: Step) -> list[str]:
    with FakeTensorMode():
        x = torch.ones(64, 64, requires_grad=True)
        with StepRecorder(known=[x], parameters=[x]) as recorder:
            step(x)
    return [kernel.op for kernel in recorder.log.kernels if kernel.op in ("aten::add", "aten::add_")]


def run(step: Step) -> list[str]:
    x = torch.ones(64, 64, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step(x)
    return [event.name for event in seen.events() if event.name in ("aten::add", "aten::add_")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [two_uses, residual, held_by_a_hook, expanded, sliced])
def test_sums_of_gradients_are_the_engines(step: Step) -> None:
    assert traced(step) == run(step)
