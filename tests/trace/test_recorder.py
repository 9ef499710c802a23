"""A storage's life as the allocator would see it: born once, views are free, gone when the last view is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from launchkit.trace.recorder import AllocRecord, Log, Place, StepRecorder


@contextmanager
def recording(*known: torch.Tensor, parameters: tuple[torch.Tensor, ...] = ()) -> Iterator[StepRecorder]:
    with StepRecorder(known=known, parameters=parameters) as recorder:
        recorder.recording = True
        yield recorder
        recorder.recording = False


def story(log: Log) -> list[int]:
    """Births as bytes, deaths as those of what died, negative."""
    sizes: dict[int, int] = {}
    told = []
    for record in log.memory:
        if isinstance(record, AllocRecord):
            sizes[record.storage] = record.num_bytes
            told.append(record.num_bytes)
        else:
            told.append(-sizes.get(record.storage, 0))
    return told


def test_births_and_deaths_are_told_in_order() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 4)
        with recording(x) as recorder:
            y = x + 1
            z = torch.cat([y, y])
            del y
            w = z.to(torch.bfloat16)
            del z, w
    assert story(recorder.log) == [64, 128, -64, 64, -128, -64]


def test_views_allocate_nothing_and_keep_their_storage_alive() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 4)
        with recording(x) as recorder:
            y = x + 1
            views = [y.view(16), y[1], y.t(), y.detach()]
            del y
            assert story(recorder.log) == [64]
            del views
    assert story(recorder.log) == [64, -64]


def test_what_was_there_before_is_not_born() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 4)
        with recording(x) as recorder:
            x.add_(1)
            x.view(16).mul_(2)
    assert story(recorder.log) == []
    assert [kernel.op for kernel in recorder.log.kernels] == ["aten::add_", "aten::mul_"]


def test_a_kernel_has_its_flops_and_its_traffic() -> None:
    with FakeTensorMode():
        x, y = torch.empty(2, 3), torch.empty(3, 5)
        with recording(x, y) as recorder:
            out = x @ y
            out.view(10)
    (kernel,) = recorder.log.kernels
    assert (kernel.op, kernel.flops, kernel.num_bytes) == ("aten::mm", 2 * 2 * 3 * 5, 4 * (6 + 15 + 10))


def test_places_know_the_parameters_that_they_read_and_tied_ones_are_one() -> None:
    with FakeTensorMode():
        weight, other = torch.nn.Parameter(torch.empty(4, 4)), torch.nn.Parameter(torch.empty(4, 4))
        tied = weight.detach()
        with recording(weight, other, parameters=(weight, other)) as recorder:
            recorder.place = Place("forward.0", 0)
            kept = [weight + 1]
            recorder.place = Place("forward.1", 0)
            kept += [tied @ weight.t(), tied + other]
            numbers = [recorder.number(t) for t in (weight, tied, other)]
    assert numbers[0] == numbers[1] != numbers[2]
    assert recorder.log.uses == {Place("forward.0", 0): {0}, Place("forward.1", 0): {0, 1}}


def test_scratch_lives_only_while_its_kernel_runs() -> None:
    """Flash attention's backward holds, behind its outputs, a row sum and an fp32 accumulator for the queries."""
    batch, heads, length, head = 2, 4, 64, 8
    with FakeTensorMode():
        query, key, value = (torch.empty(batch, heads, length, head, dtype=torch.bfloat16) for _ in range(3))
        for tensor in (query, key, value):
            tensor.requires_grad_()
        with recording(query, key, value) as recorder:
            out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
            out.backward(torch.empty_like(out))
    rows, gradient = batch * heads * length * 4, batch * heads * length * head * 2
    told = story(recorder.log)
    birth = told.index(rows * head)
    assert told[birth - 4 : birth + 3] == [*[gradient] * 3, rows, rows * head, -rows, -rows * head]
