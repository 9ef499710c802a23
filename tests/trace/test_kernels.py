"""Scratch of the CPU's own kernels, as torch's allocator really sees it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from launchkit.trace.kernels import Scratch, scratch


def rise(call: Callable[[], object]) -> int:
    """How far the live bytes rise during ``call`` above where they end, with its result held, in bytes."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        call()  # what is made once
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            held = call()
    finally:
        torch.backends.mkldnn.enabled = before
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    kept = [event.nbytes() for event in events if event.name() == "[memory]"]
    del held
    levels = list(accumulate(kept))
    return max(levels) - levels[-1]


MASK = torch.ones(64, 256, dtype=torch.bool)


def most(found: Scratch) -> int:
    return max(map(sum, found))


@pytest.mark.parametrize(
    ("made", "shape"),
    [
        (partial(nn.Conv2d, 3, 32, 16, 16), (4, 3, 64, 64)),
        (partial(nn.Conv2d, 8, 32, 3, padding=1), (4, 8, 32, 32)),
        (partial(nn.Conv3d, 3, 32, (2, 14, 14), (2, 14, 14)), (50, 3, 2, 14, 14)),
    ],
    ids=["patches", "overlapping", "3d"],
)
def test_convolution(made: Callable[..., nn.Conv2d], shape: tuple[int, ...]) -> None:
    layer = made(bias=False)
    source, weight = torch.randn(shape), layer.weight.detach()
    options = (layer.stride, layer.padding, layer.dilation, False, [0], 1)

    def forward() -> torch.Tensor:
        return torch.convolution(source, weight, None, *options)

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.ops.aten.convolution_backward(result, source, weight, None, *options, [False, True, False])

    result = forward()
    assert rise(forward) == most(scratch("aten::convolution", [source, weight], [result], on_cpu=True))
    inputs = [result, source, weight]
    assert rise(backward) == most(scratch("aten::convolution_backward", inputs, [weight], on_cpu=True))


def test_gradient_out_of_order_is_copied() -> None:
    source, weight = torch.empty(4, 3, 64, 64), torch.empty(32, 3, 16, 16)
    columns = source.nbytes  # patches side by side
    in_order = torch.empty(4, 32, 4, 4)
    out_of_order = torch.empty(4, 4, 4, 32).permute(0, 3, 1, 2)
    for gradient, copied in ((in_order, 0), (out_of_order, in_order.nbytes)):
        found = scratch("aten::convolution_backward", [gradient, source, weight], [weight], on_cpu=True)
        assert most(found) == columns + copied


def test_grouped_convolution_holds_next_to_nothing() -> None:
    found = scratch(
        "aten::convolution",
        [torch.empty(2, 64, 300), torch.empty(64, 1, 4)],
        [torch.empty(2, 64, 303)],
        on_cpu=True,
    )
    assert most(found) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [16, 512])
def test_scaled_product(tokens: int, dtype: torch.dtype) -> None:
    left = torch.randn(tokens, 128).to(torch.float8_e4m3fn)
    right = torch.randn(96, 128).to(torch.float8_e4m3fn).t()
    scales = (torch.ones(tokens, 1), torch.ones(1, 96))

    def product() -> torch.Tensor:
        return torch._scaled_mm(left, right, *scales, out_dtype=dtype)

    found = scratch("aten::_scaled_mm", [left, right, *scales], [product()], on_cpu=True)
    assert rise(product) == most(found)


def test_cuda_has_scratch_of_its_own() -> None:
    tensors = [torch.empty(2, 4, 64, 8, dtype=torch.bfloat16)] * 3
    backward = "aten::_scaled_dot_product_flash_attention_backward"
    assert most(scratch(backward, tensors, [], on_cpu=False)) == 2 * 4 * 64 * 4 * 9
    assert scratch(backward, tensors, [], on_cpu=True) == ()
    assert scratch("aten::convolution", [], [], on_cpu=False) == ()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("mul", lambda wide, narrow: torch.mul(narrow, wide)),
        ("add_", lambda wide, narrow: narrow.clone().add_(wide)),
        ("add_", lambda wide, narrow: wide.clone().add_(narrow)),
        ("gt", torch.gt),
        ("where", lambda wide, narrow: torch.where(MASK, wide, narrow)),
        ("mul", lambda wide, narrow: torch.mul(wide, wide)),
        ("mul", lambda wide, narrow: torch.mul(wide, narrow[:1].expand(64, 256))),
    ],
)
def test_operands_of_two_dtypes_meet_in_a_copy(
    name: str, call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    seen: list[int] = []

    class Probe(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func._schema.name == f"aten::{name}":
                tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
                seen.append(sum(map(sum, scratch(func._schema.name, tensors, [out], on_cpu=True))))
            return out

    wide, narrow = torch.randn(64, 256), torch.randn(64, 256, dtype=torch.bfloat16)
    with Probe():
        call(wide, narrow)
    assert rise(lambda: call(wide, narrow)) == seen[0]


def test_layer_norm_copies_what_lies_out_of_order() -> None:
    norm = nn.LayerNorm(64).requires_grad_(False)
    source = torch.randn(4, 64, 32).transpose(1, 2)
    found = scratch("aten::native_layer_norm", [source, norm.weight, norm.bias], [torch.empty(1)], on_cpu=True)
    statistics = 2 * 4 * 32 * 4
    assert rise(lambda: norm(source)) == most(found) + statistics
    assert scratch("aten::native_layer_norm", [torch.empty(4, 64)], [torch.empty(1)], on_cpu=True) == ()
