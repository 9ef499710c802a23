"""A remembered operator makes what the fake tensor mode makes: the same look, the same storage shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from launchkit.trace import recorder
from launchkit.trace.recorder import StepRecorder

Operator = Callable[[torch.Tensor], Any]

aten = torch.ops.aten

REMEMBERED: dict[str, Operator] = {
    "a tensor of its own": lambda x: x + 1,
    "another dtype": lambda x: x > 0,
    "a view": lambda x: x[1:].t(),
    "a view of another dtype": lambda x: x.view(torch.int32),
    "several views": lambda x: x.split(2),
    "several tensors": lambda x: x.max(dim=1),
    "none of several": lambda x: aten.native_layer_norm_backward(
        x, x, [6], x[:, :1], x[:, :1], None, None, [True, False, False]
    ),
    "the argument itself": lambda x: x.add_(1),
    "an argument by name": lambda x: torch.mul(x, 2, out=torch.empty(4, 6)),
    "out of nothing": lambda x: torch.zeros(3, 3),
    "whole numbers among tensors": lambda x: aten._scaled_dot_product_flash_attention(
        *[torch.empty(1, 2, 32, 16, dtype=torch.bfloat16)] * 3
    ),
    "a list": lambda x: torch.cat([x, x.t().contiguous().t()]),
}
FORGOTTEN: dict[str, Operator] = {
    "another storage put under it": lambda x: torch.empty(4, 6).set_(x),
    "a view made in place": lambda x: x.t_(),
    "a part of a larger storage of its own": lambda x: aten._fft_r2c(x, [1], 0, True),
    "values": lambda x: torch.tensor(2.0),
}


def looks(out: Any, x: torch.Tensor) -> list[Any]:
    """What can be told of each output, with whether it shares ``x``'s storage and is ``x``."""
    tensors = out if isinstance(out, (tuple, list)) else [out]
    return [
        t if t is None or type(t) is int else (
            type(t), t.shape, t.stride(), t.storage_offset(), t.dtype, t.device, t.untyped_storage().nbytes(),
            t.untyped_storage()._cdata == x.untyped_storage()._cdata, t is x, torch._C._dispatch_key_set(t),
        )
        for t in tensors
    ]  # fmt: skip


def run(operator: Operator, *, records: bool) -> list[Any]:
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 6)
        if not records:
            return looks(operator(x), x)
        with StepRecorder(known=[x], parameters=[x]) as active:
            active.recording = True
            found = looks(operator(x), x)
        return [
            found,
            [record._replace(storage=0) for record in active.log.memory],
            active.log.kernels,
            active.log.uses,
        ]


@pytest.mark.parametrize("name", REMEMBERED)
def test_what_is_remembered_is_what_was_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, known = REMEMBERED[name], {}
    monkeypatch.setattr(recorder, "_KNOWN", known)
    plain = run(operator, records=False)
    first = run(operator, records=True)
    monkeypatch.setattr(StepRecorder, "_run", lambda *_: pytest.fail("it was run again"))
    assert known
    assert run(operator, records=True) == first
    assert first[0] == plain


@pytest.mark.parametrize("name", FORGOTTEN)
def test_what_depends_on_more_than_looks_is_left_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = FORGOTTEN[name]
    monkeypatch.setattr(recorder, "_KNOWN", {})
    plain = run(operator, records=False)
    assert run(operator, records=True)[0] == run(operator, records=True)[0] == plain


def test_numbers_that_are_equal_but_of_another_type_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_KNOWN", {})
    with FakeTensorMode():
        x = torch.empty(4, dtype=torch.int64)
        with StepRecorder(known=[x], parameters=[]):
            assert [(x + 1).dtype, (x + 1.0).dtype, (x + 1).dtype] == [torch.int64, torch.float32, torch.int64]


def test_the_table_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(recorder, "_KNOWN", known)
    monkeypatch.setattr(recorder, "_MOST_KNOWN", 3)
    with FakeTensorMode():
        x = torch.empty(9)
        with StepRecorder(known=[x], parameters=[]):
            for i in range(9):
                x[i:].sin()
    assert 0 < len(known) <= 3
