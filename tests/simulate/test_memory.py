"""Memory readings: CPU against plain sums, CUDA against the allocator's own counters, and their laws."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchkit.program import (
    Alloc,
    Anchor,
    Free,
    Owner,
    Persistent,
    Phase,
    Point,
    Size,
    Stage,
    StepProgram,
    Stream,
    TensorRef,
    local,
)
from launchkit.scenario import DeviceKind
from launchkit.simulate.allocator import AllocatorSettings
from launchkit.simulate.expand import expand
from launchkit.simulate.memory import MemoryReading, read_memory, simulate_memory
from launchkit.simulate.reading import compile_program
from launchkit.units import MIB
from tests.simulate.programs import random_program, section, tiny_program

POINT = Point(2, 3)


def training_program(*, builds_states: bool = False) -> StepProgram:
    """30 MiB of weights; a forward that keeps 40 MiB, freed in the backward, which leaves 30 MiB of gradients to the
    optimizer; 60 MiB of states, there from the start or built by the step."""
    kept, gradient = Size.constant(40 * MIB), Size.constant(30 * MIB)
    states = Size.constant(60 * MIB)
    drop_gradient = Free(TensorRef("backward", Anchor.RELATIVE, 0, 0), gradient)
    return replace(
        tiny_program(),
        stages=(
            Stage(name="forward", phase=Phase.FORWARD, layers=(0,)),
            Stage(name="backward", phase=Phase.BACKWARD, layers=(1,)),
            Stage(name="optimizer", phase=Phase.OPTIMIZER, layers=(2,)),
        ),
        sections=(
            section(Alloc(0, kept, Owner.ACTIVATIONS)),
            section(Alloc(0, gradient, Owner.GRADIENTS), Free(TensorRef("forward", Anchor.RELATIVE, 0, 0), kept)),
            section(*[Alloc(0, states, Owner.OPTIMIZER_STATES)] * builds_states, drop_gradient),
        ),
        persistent=(
            Persistent(gradient, Owner.WEIGHTS),
            *[Persistent(states, Owner.OPTIMIZER_STATES)] * (not builds_states),
        ),
    )


def test_cpu_reading_by_hand() -> None:
    """On CPU the live bytes are what is allocated, and reserved equals allocated."""
    reading = simulate_memory(tiny_program(), POINT, device_kind=DeviceKind.CPU)
    assert (reading.allocated_peak_bytes, reading.reserved_peak_bytes, reading.steady_bytes) == (24400, 24400, 1400)
    assert (reading.peak_stage, reading.peak_phase, reading.num_steps) == ("head", Phase.LOSS, 1)
    assert {owner: value for owner, value in reading.at_peak.items() if value} == {
        Owner.WEIGHTS: 1400,
        Owner.ACTIVATIONS: 18000,
        Owner.LOGITS: 5000,
    }
    assert set(reading.at_peak) == set(Owner)


def test_cuda_reading_rounds_blocks() -> None:
    """On CUDA every storage takes whole blocks of 512 B from 2 MiB segments."""
    reading = simulate_memory(tiny_program(), POINT, device_kind=DeviceKind.CUDA)
    assert reading.allocated_peak_bytes == 2 * 1024 + 3 * 6144 + 5120
    assert (reading.reserved_peak_bytes, reading.steady_bytes, reading.num_steps) == (2 * MIB, 2048, 2)


def test_optimizer_states_come_among_the_cached_blocks() -> None:
    """States built at the end of the first step find the forward's block too small and take a segment. The second step
    needs no more here."""
    reading = simulate_memory(training_program(), POINT, device_kind=DeviceKind.CUDA)
    assert reading.allocated_peak_bytes == (30 + 60 + 40 + 30) * MIB
    assert reading.reserved_peak_bytes == reading.reserved_first_step_bytes == 160 * MIB
    assert reading.peak_stage == "backward"


def test_a_second_step_can_reserve_more() -> None:
    """States that settle in the forward's cached block drive the next forward out: the warm-up is no measure."""
    program = training_program()
    small_states = replace(
        program, persistent=(program.persistent[0], Persistent(Size.constant(39 * MIB), Owner.OPTIMIZER_STATES))
    )
    reading = simulate_memory(small_states, POINT, device_kind=DeviceKind.CUDA)
    assert (reading.reserved_first_step_bytes, reading.reserved_peak_bytes) == (100 * MIB, 140 * MIB)


@pytest.mark.parametrize(("lag", "reserved_mib"), [(0, 120), (1, 120), (2, 150)])
def test_gathered_weights_have_blocks_of_their_own_until_they_are_read(lag: int, reserved_mib: int) -> None:
    """Beside 30 MiB of weights three gathers follow each other, and a temporary that cannot use their 30 MiB blocks.
    With a lag of two the second gather begins before the first one's block is handed out again."""
    size, other = Size.constant(30 * MIB), Size.constant(60 * MIB)
    gather = Alloc(0, size, Owner.GATHERED_WEIGHTS, stream=Stream.GATHER, lag=lag)
    program = replace(
        tiny_program(),
        stages=(
            Stage(name="gathers", phase=Phase.FORWARD, layers=(0, 0, 0), stack="layers"),
            Stage(name="rest", phase=Phase.BACKWARD, layers=(1,)),
        ),
        sections=(
            section(gather, Free(local("gathers", 0), size)),
            section(Alloc(0, other, Owner.TEMPORARIES), Free(local("rest", 0), other)),
        ),
        persistent=(Persistent(size, Owner.WEIGHTS),),
    )
    reading = simulate_memory(program, POINT, device_kind=DeviceKind.CUDA)
    assert (reading.reserved_peak_bytes, reading.allocated_peak_bytes) == (reserved_mib * MIB, 90 * MIB)


def test_a_first_step_is_run_once() -> None:
    """A step that leaves its states behind is read as it is."""
    reading = simulate_memory(training_program(builds_states=True), POINT, device_kind=DeviceKind.CUDA)
    assert (reading.num_steps, reading.steady_bytes) == (1, 90 * MIB)
    assert reading.allocated_peak_bytes == 120 * MIB
    assert (reading.peak_stage, reading.at_peak[Owner.OPTIMIZER_STATES]) == ("optimizer", 60 * MIB)


@pytest.mark.parametrize(("capacity", "exceeds"), [(160, False), (159, True)])
def test_capacity(capacity: int, exceeds: bool) -> None:
    """What does not fit is said, with the figures of a device on which it would."""
    reading = simulate_memory(training_program(), POINT, device_kind=DeviceKind.CUDA, capacity_bytes=capacity * MIB)
    assert (reading.exceeds_capacity, reading.reserved_peak_bytes) == (exceeds, 160 * MIB)


def test_a_tight_capacity_is_met_by_releasing_the_cache() -> None:
    """Between what is allocated and what would be reserved the cache is given back, and the step runs."""
    first, second = Size.constant(40 * MIB), Size.constant(60 * MIB)
    events = (
        Alloc(0, first, Owner.ACTIVATIONS),
        Free(local("forward", 0), first),
        Alloc(1, second, Owner.ACTIVATIONS),
        Free(local("forward", 1), second),
    )
    program = replace(training_program(), sections=(section(*events),), stages=training_program().stages[:1])
    program = replace(program, persistent=program.persistent[:1])
    free, tight = (
        simulate_memory(program, POINT, device_kind=DeviceKind.CUDA, capacity_bytes=capacity)
        for capacity in (None, 95 * MIB)
    )
    assert (free.reserved_peak_bytes, free.num_retries) == (130 * MIB, 0)
    assert (tight.reserved_peak_bytes, tight.num_retries, tight.exceeds_capacity) == (90 * MIB, 1, False)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), micro_batch=st.integers(1, 4), expandable=st.booleans())
def test_laws(seed: int, micro_batch: int, expandable: bool) -> None:
    """Owners sum to the peak, CUDA never allocates less than the live bytes, reserved is never below allocated."""
    program, point = random_program(seed), Point(micro_batch, 200)
    cpu = simulate_memory(program, point, device_kind=DeviceKind.CPU, num_timeline_points=7)
    cuda = simulate_memory(
        program,
        point,
        device_kind=DeviceKind.CUDA,
        settings=AllocatorSettings(expandable_segments=expandable),
        num_timeline_points=1000,
    )
    for reading in (cpu, cuda):
        assert sum(reading.at_peak.values()) == reading.allocated_peak_bytes <= reading.reserved_peak_bytes
        assert min(reading.at_peak.values()) >= 0
        if reading.peak_stage:
            assert max(sum(moment.live_bytes) for moment in reading.timeline) == reading.allocated_peak_bytes
    assert cpu.allocated_peak_bytes == compile_program(program).peak(point).num_bytes
    assert cuda.allocated_peak_bytes >= compile_program(program).peak(point, granularity_bytes=512).num_bytes
    assert len(cpu.timeline) <= 7
    assert cpu.resident_peak_bytes >= cpu.allocated_peak_bytes
    assert read_memory(program, point) == without_heap(cpu)


def without_heap(reading: MemoryReading) -> MemoryReading:
    """A reading as it is without a timeline and a model of the heap."""
    return replace(reading, timeline=(), resident_peak_bytes=reading.allocated_peak_bytes)


def test_an_owner_is_told_apart_within_one_section() -> None:
    """A slot that is a temporary first and an activation later in the same layer is split as it is lived."""
    size = Size.constant(100)
    events = (
        Alloc(0, size, Owner.TEMPORARIES),
        Free(local("forward", 0), size),
        Alloc(0, size, Owner.ACTIVATIONS),
    )
    program = replace(
        tiny_program(),
        sections=(section(*events),),
        stages=(Stage(name="forward", phase=Phase.FORWARD, layers=(0,) * 4),),
    )
    reading = read_memory(program, POINT)
    assert reading == without_heap(simulate_memory(program, POINT, device_kind=DeviceKind.CPU))
    assert (reading.at_peak[Owner.ACTIVATIONS], reading.at_peak[Owner.TEMPORARIES]) == (300, 100)


def test_the_timeline_keeps_the_peak() -> None:
    """Thinned out to three points, the highest of each third of the events remains."""
    program = tiny_program()
    reading = simulate_memory(program, POINT, device_kind=DeviceKind.CPU, num_timeline_points=3)
    levels = list(accumulate(event.delta_bytes for event in expand(program, POINT)))[2:]
    assert [sum(moment.live_bytes) for moment in reading.timeline] == [
        max(levels[start : start + 5]) for start in range(0, len(levels), 5)
    ]
    assert reading.timeline[2].stage == "head"
