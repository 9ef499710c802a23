"""Expansion of step programs, and the cheap reading against it."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchkit.errors import ProgramError
from launchkit.program import Alloc, Anchor, Free, Owner, Phase, Point, Size, Stage, StepProgram, TensorRef, Term, local
from launchkit.simulate.expand import PERSISTENT_STAGE, MemoryEvent, expand
from launchkit.simulate.reading import compile_program
from launchkit.units import round_up
from tests.simulate.programs import random_program, section, tiny_program

POINTS = st.builds(Point, st.integers(1, 5), st.integers(1, 300), st.integers(0, 16))


def live_peak(program: StepProgram, point: Point, granularity_bytes: int = 1) -> tuple[int, str]:
    """The peak and its stage from the written-out events."""
    live, peak, stage = 0, 0, ""
    for event in expand(program, point):
        sign = 1 if event.delta_bytes > 0 else -1
        live += sign * round_up(abs(event.delta_bytes), granularity_bytes)
        if live > peak:
            peak, stage = live, "" if event.stage == PERSISTENT_STAGE else program.stages[event.stage].name
    return peak, stage


def test_expand_writes_out_every_layer() -> None:
    """Persistent storages come first, then the layers in their order; what a layer frees is its own."""
    events = list(expand(tiny_program(), Point(2, 3)))
    assert events[:5] == [
        MemoryEvent(0, 700, Owner.WEIGHTS, -1),
        MemoryEvent(1, 700, Owner.WEIGHTS, -1),
        MemoryEvent(2, 6000, Owner.ACTIVATIONS, 0),
        MemoryEvent(3, 600, Owner.TEMPORARIES, 0),
        MemoryEvent(3, -600, Owner.TEMPORARIES, 0),
    ]
    assert [event.tensor for event in events if event.delta_bytes == -6000] == [6, 4, 2]
    assert sum(event.delta_bytes for event in events) == 1400


@pytest.mark.parametrize(("anchor", "layer"), [(Anchor.FIRST, 1), (Anchor.LAST, 1)])
def test_expand_resolves_anchors(anchor: Anchor, layer: int) -> None:
    """Counted from either end of a stack of three, layer 1 is the middle one."""
    free = Free(TensorRef("forward", anchor, layer, 0), Size((Term(1000, 1, 1),)))
    events = list(expand(tiny_program(free=free, freed_stage_layers=1), Point(2, 3)))
    assert events[-1] == MemoryEvent(4, -6000, Owner.ACTIVATIONS, 2)


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (Free(TensorRef("forward", Anchor.FIRST, 0, 0), Size((Term(1000, 1, 1),))), r"backward\[1\] frees tensor forw"),
        (Free(TensorRef("forward", Anchor.RELATIVE, 1, 0), Size((Term(1000, 1, 1),))), r"forward\[3\].0, which is not"),
        (Free(TensorRef("forward", Anchor.RELATIVE, 0, 1), Size.constant(600)), r"forward\[2\].1, which is not live"),
        (Free(TensorRef("forward", Anchor.RELATIVE, 0, 0), Size.constant(7)), r"frees 7 bytes of .* which has 6000 at"),
        (Free(TensorRef("elsewhere", Anchor.RELATIVE, 0, 0), Size.constant(7)), r"has no stage 'elsewhere'"),
    ],
)
def test_expand_refuses_contradictions(free: Free, message: str) -> None:
    """A free must find its tensor alive and of the size it says."""
    with pytest.raises(ProgramError, match=message):
        list(expand(tiny_program(free=free), Point(2, 3)))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ((Alloc(0, Size.constant(8), Owner.INPUTS),) * 2, r"tensor forward\[0\].0 is allocated while it is live"),
        ((Alloc(0, Size.constant(-8), Owner.INPUTS),), r"tensor forward\[0\].0 has -8 bytes"),
    ],
)
def test_expand_refuses_allocations(events: tuple[Alloc, ...], message: str) -> None:
    """A slot is taken once at a time, and has no negative size."""
    program = tiny_program()
    with pytest.raises(ProgramError, match=message):
        list(expand(program.with_sections((section(*events), *program.sections[1:])), Point(1, 1)))


def test_peak_of_a_program_worked_out_by_hand() -> None:
    """Three layers' activations, the weights and the logits are live together at the loss."""
    compiled = compile_program(tiny_program())
    assert compiled.peak(Point(2, 3)) == (2 * 700 + 3 * 6000 + 5000, "head")
    assert compiled.peak(Point(2, 3), granularity_bytes=512) == (2 * 1024 + 3 * 6144 + 5120, "head")


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**9), point=POINTS, granularity_bytes=st.sampled_from([1, 512]))
def test_reading_equals_expansion(seed: int, point: Point, granularity_bytes: int) -> None:
    """The cheap reading is the peak of the written-out events, to the byte and to the stage."""
    program = random_program(seed)
    reading = compile_program(program).peak(point, granularity_bytes=granularity_bytes)
    assert reading == live_peak(program, point, granularity_bytes)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), point=POINTS)
def test_more_tokens_never_lower_the_peak(seed: int, point: Point) -> None:
    """Sizes with positive coefficients make the peak grow with batch and length."""
    compiled = compile_program(random_program(seed))
    peak = compiled.peak(point).num_bytes
    assert compiled.peak(point._replace(micro_batch=point.micro_batch + 1)).num_bytes >= peak
    assert compiled.peak(point._replace(seq_len=point.seq_len + 1)).num_bytes >= peak


def test_a_slot_of_several_owners_is_told_apart_by_layer() -> None:
    """Where a slot is a gradient in one layer and an activation in another, freeing all gradients spares the rest."""
    size = Size.constant(100)
    sections = (
        section(Alloc(0, size, Owner.GRADIENTS)),
        section(Alloc(0, size, Owner.ACTIVATIONS)),
        section(Free(local("first", 0), size), Alloc(9, Size.constant(30), Owner.GRADIENTS)),
        random_program(0).sections[-1],
    )
    stages = (
        Stage(name="first", phase=Phase.FORWARD, layers=(0, 1, 0, 1)),
        Stage(name="second", phase=Phase.BACKWARD, layers=(2, 2, 2)),
        Stage(name="optimizer", phase=Phase.OPTIMIZER, layers=(3, 3)),
    )
    program = replace(tiny_program(), sections=sections, stages=stages)
    assert compile_program(program).peak(Point(1, 1)) == live_peak(program, Point(1, 1))


def large_program() -> StepProgram:
    """Eight templates of 150 events over a stack of 80 layers."""
    size = [Size((Term(1000 + slot, 1, 1),)) for slot in range(75)]
    templates = []
    for stage in range(8):
        allocs = [Alloc(slot, size[slot], Owner.ACTIVATIONS) for slot in range(75)]
        frees = [Free(local(f"s{stage}", slot), size[slot]) for slot in range(75)]
        templates.append(section(*allocs, *frees))
    stages = tuple(Stage(name=f"s{index}", phase=Phase.FORWARD, layers=(index,) * 80) for index in range(8))
    return replace(tiny_program(), sections=tuple(templates), stages=stages)


def test_reading_is_cheap() -> None:
    """A program of 8 templates × 150 events takes well under a millisecond a point (0.1 ms where it was written)."""
    compiled = compile_program(large_program())
    best = 1.0
    for length in range(20):
        start = time.perf_counter()
        compiled.peak(Point(2, 100 + length), granularity_bytes=512)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3
