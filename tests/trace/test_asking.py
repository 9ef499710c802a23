"""What this machine's kernels are seen to take, and a program of one batch that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from launchkit.program import Point
from launchkit.scenario import Compute, DeviceKind
from launchkit.trace import trace_model
from launchkit.trace.asking import measured_scratch, own_kernels
from tests.trace.models import LLAMA, key

pytestmark = pytest.mark.filterwarnings("ignore")
aten = torch.ops.aten


@pytest.fixture(params=[True, False], ids=["onednn", "own"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = request.param
    yield own_kernels()
    torch.backends.mkldnn.enabled = before


def rise(call: Any) -> int:
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        held = call()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    levels = list(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    del held
    return max(levels) - levels[-1]


@pytest.mark.parametrize("rows", [1, 33, 256, 384])
def test_a_product_is_asked_for_by_shape_strides_and_dtype(kernels: Any, rows: int) -> None:
    left, right = torch.randn(rows, 128).bfloat16(), torch.randn(192, 128).bfloat16().t()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(part) for part in (left, right)]
        found = measured_scratch(aten.mm.default, tuple(fakes), {}, kernels=kernels)
    assert found is not None
    assert sum(map(sum, found)) == rise(lambda: torch.mm(left, right))


def test_what_is_too_large_is_not_run() -> None:
    with FakeTensorMode():
        factor = torch.empty(1 << 15, 1 << 15)
        assert measured_scratch(aten.mm.default, (factor, factor), {}, kernels=own_kernels()) is None


def test_a_program_of_one_batch_is_that_of_any_but_for_scratch() -> None:
    """In fp32 a product holds nothing beside its result, so that the two tell the same bytes."""
    from launchkit.simulate.memory import read_memory

    point = Point(2, 64)
    of_any = key(device=DeviceKind.CPU, compute=Compute.FP32)
    of_one = key(device=DeviceKind.CPU, compute=Compute.FP32, at=point)
    peaks = [read_memory(trace_model(LLAMA, chosen), point).allocated_peak_bytes for chosen in (of_any, of_one)]
    assert peaks[0] == peaks[1]
    assert of_any.text != of_one.text
