"""DDP's buckets, against the reducer's own assignment, and what they add to a step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchkit import strategies
from launchkit.program import CollectiveKind, Owner, Phase, StepProgram
from launchkit.scenario import CommHook, DdpSettings
from launchkit.strategies import ddp
from launchkit.strategies.ddp import assign_buckets, bucket_limits, closings
from tests.builders import cluster, profile, scenario
from tests.strategies.small import NUM_ELEMENTS, end, most, peak, plain, program, ranks, start

GRADIENTS = 4 * NUM_ELEMENTS


def rewritten(**overrides: Any) -> StepProgram:
    return strategies.rewrite(program(), scenario=plain(strategy="ddp", **overrides), cluster=ranks(2))


@pytest.mark.parametrize(
    ("gradients", "limits", "expected"),
    [
        ([(4, 10), (4, 10), (4, 10)], (), [30]),
        ([(4, 10), (4, 10), (4, 10)], (10, 25), [10, 20]),
        ([(4, 4), (4, 8), (4, 30), (4, 30)], (10, 25), [12, 30, 30]),
        ([(4, 10), (2, 10), (4, 10), (2, 10)], (15, 15), [20, 20]),
        ([(4, 100)], (10, 25), [100]),
        ([], (10, 25), []),
    ],
)
def test_buckets(gradients: list[tuple[int, int]], limits: tuple[int, ...], expected: list[int]) -> None:
    assert list(assign_buckets(gradients, limits)) == expected


@settings(deadline=None)
@given(
    numels=st.lists(st.integers(1, 200), min_size=1, max_size=30),
    limits=st.tuples(st.integers(1, 400), st.integers(1, 400)),
)
def test_buckets_are_torchs_own(numels: list[int], limits: tuple[int, int]) -> None:
    """``torch.distributed._compute_bucket_assignment_by_size`` fills the same buckets."""
    torch = pytest.importorskip("torch")
    tensors = [torch.empty(numel) for numel in numels]
    indices, _ = torch.distributed._compute_bucket_assignment_by_size(tensors, list(limits))
    expected = [sum(4 * numels[index] for index in bucket) for bucket in indices]
    assert sorted(assign_buckets(((4, 4 * numel) for numel in numels), limits)) == sorted(expected)


@pytest.mark.parametrize(
    ("settings", "first_step", "expected"),
    [
        ({}, True, ()),
        ({}, False, (2**20, 25 * 2**20)),
        ({"find_unused_parameters": True}, True, (2**20, 25 * 2**20)),
        ({"find_unused_parameters": True, "static_graph": True}, True, ()),
    ],
)
def test_limits(settings: dict[str, bool], first_step: bool, expected: tuple[int, ...]) -> None:
    """Buckets that will be rebuilt start as one."""
    assert bucket_limits(DdpSettings(**settings), first_step=first_step) == expected


def test_gradients_exist_twice() -> None:
    single = strategies.rewrite(program(), scenario=plain(), cluster=ranks(1))
    assert peak(rewritten()) == peak(single) + GRADIENTS
    assert end(rewritten()) == end(single) + GRADIENTS
    assert start(rewritten())[Owner.COMMUNICATION] == GRADIENTS


def test_bucket_views_hold_gradients_once() -> None:
    views = strategies.rewrite(
        program(), scenario=plain(strategy="ddp", gradient_as_bucket_view=True), cluster=ranks(2)
    )
    assert most(views, Owner.GRADIENTS) == 0
    assert most(views, Owner.COMMUNICATION) == GRADIENTS
    assert peak(views) == peak(rewritten()) - GRADIENTS + 400 + 3 * 40  # the head's, until it is copied


def test_unused_parameters_are_mapped() -> None:
    assert start(rewritten(find_unused_parameters=True))[Owner.COMMUNICATION] == GRADIENTS + 4 * 8


def test_every_gradient_is_reduced_once() -> None:
    step = rewritten()
    total = 0
    for stage in step.stages:
        if stage.phase is Phase.BACKWARD:
            for layer in stage.order():
                for message in step.section_of(stage, layer).collectives:
                    assert message.kind is CollectiveKind.ALL_REDUCE
                    total += message.num_bytes.at((2, 8, 0))
    assert total == GRADIENTS


@pytest.mark.parametrize(
    ("gradients", "limits", "expected"),
    [
        ([(4, 10), (4, 10), (4, 10)], (10, 25), [(10,), (), (20,)]),
        ([(4, 10), (2, 10)], (), [(), (10, 10)]),  # the last one closes what is left of every dtype
    ],
)
def test_buckets_are_closed_by_the_gradient_that_fills_them(
    gradients: list[tuple[int, int]], limits: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    closed = closings(gradients, limits)
    assert [tuple(bucket.num_bytes for bucket in buckets) for buckets in closed] == expected


def test_a_cap_of_ones_own_holds_for_the_first_bucket_too() -> None:
    assert bucket_limits(DdpSettings(bucket_cap_bytes=100), first_step=False) == (100,)


def test_a_communication_hook_sends_half_from_a_copy_of_the_bucket_that_is_full() -> None:
    hooked, plain_step = rewritten(comm_hook=CommHook.BF16), rewritten()
    assert most(hooked, Owner.COMMUNICATION) == GRADIENTS + GRADIENTS // 2  # one bucket, so all of it
    assert sum(sent(hooked)) * 2 == sum(sent(plain_step)) == GRADIENTS


def test_gradients_of_16_bits_need_no_copy() -> None:
    narrow = strategies.rewrite(
        program(itemsize=2), scenario=plain(strategy="ddp", comm_hook=CommHook.BF16), cluster=ranks(2)
    )
    assert most(narrow, Owner.COMMUNICATION) == 2 * NUM_ELEMENTS


def sent(step: StepProgram) -> list[int]:
    return [
        message.num_bytes.at((2, 8, 0))
        for stage in step.stages
        for layer in stage.order()
        for message in step.section_of(stage, layer).collectives
    ]


@pytest.mark.parametrize(
    ("hook", "backend", "refused"), [("bf16", "cpu", True), ("bf16", "cuda", False), ("fp16", "cpu", False)]
)
def test_the_bf16_hook_is_not_for_gloo(hook: str, backend: str, refused: bool) -> None:
    asked = scenario(strategy="ddp", comm_hook=hook, precision="fp32")
    found = ddp.refusal(asked, profile(), cluster(num_gpus=2, backend=backend))
    assert ("comm_hook=fp16" in (found or "")) is refused
