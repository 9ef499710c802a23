"""A loop over the sequence is told by its first and last iteration and the sum of those between."""

from __future__ import annotations

from itertools import accumulate

import pytest

from launchkit.trace.loops import fold
from launchkit.trace.recorder import AllocRecord, Place

HERE = Place("forward.layers", 0)


def story(
    num_iterations: int, *, kept: int = 8, passing: int = 100
) -> tuple[list[tuple[bool, Place, int]], list[AllocRecord]]:
    """Something before the loop, ``num_iterations`` of one storage that stays and one that does not, all kept ones'
    ends, and the end of the first."""
    records = [AllocRecord(0, 1000, HERE, "aten::empty", 1)]
    events = [(True, HERE, 0)]
    for _ in range(num_iterations):
        for op, size in (("aten::mul", kept), ("aten::exp", passing)):
            events.append((True, HERE, len(records)))
            records.append(AllocRecord(len(records), size, HERE, op, 1))
        events.append((False, HERE, len(records) - 1))
    events += [(False, HERE, number) for number in range(1, len(records), 2)]
    return [*events, (False, HERE, 0)], records


def levels(events: list[tuple[bool, Place, int]], records: list[AllocRecord]) -> list[int]:
    return list(accumulate(records[n].num_bytes * (1 if is_alloc else -1) for is_alloc, _, n in events))


@pytest.mark.parametrize("num_iterations", [6, 9, 40])
@pytest.mark.parametrize(("kept", "passing"), [(8, 100), (100, 8)])
def test_peak_and_end_are_those_of_the_whole_loop(num_iterations: int, kept: int, passing: int) -> None:
    whole = story(num_iterations, kept=kept, passing=passing)
    folded = fold(*whole)
    assert max(levels(*folded)) == max(levels(*whole))
    assert levels(*folded)[-1] == 0


def test_every_number_of_iterations_tells_the_same_story() -> None:
    few, many = fold(*story(6)), fold(*story(50))
    assert few[0] == many[0]
    assert len(few[0]) < len(story(6)[0])


def test_what_does_not_repeat_stays_as_it_is() -> None:
    events, records = story(2)
    assert fold(events, records) == (events, records)
