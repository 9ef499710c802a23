"""What loading leaves in the allocator's cache."""

import pytest

from launchkit.program import Arrival, Owner
from launchkit.simulate.allocator import CachingAllocator
from launchkit.simulate.expand import PERSISTENT_STAGE, MemoryEvent
from launchkit.simulate.loading import load
from launchkit.units import MIB


class Recorder:
    """An allocator that notes what is asked of it: sizes as they are allocated, the same negative as they die."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.sizes: dict[int, int] = {}

    def malloc(self, num_bytes: int, stream: int = 0) -> int:
        self.sizes[len(self.calls)] = num_bytes
        self.calls.append(num_bytes)
        return len(self.calls) - 1

    def free(self, handle: int) -> None:
        self.calls.append(-self.sizes.pop(handle))


def storages(*sizes: int, owner: Owner = Owner.WEIGHTS) -> list[MemoryEvent]:
    return [MemoryEvent(tensor, size, owner, PERSISTENT_STAGE) for tensor, size in enumerate(sizes)]


# Real: two gloo processes, torch 2.13, two blocks of two 600-byte matrices between an embedding and a head of 1,200
# bytes each, as ``torch.profiler`` recorded them in thousands: FSDP1 on the first rank (whose weights were there
# already), accelerate's FSDP2 on the second.
FSDP1 = [1200, -1200, 1200, 600, -1200] * 2 + [2400, -2400, 2400, 1200, -2400]
FSDP2 = [1200, 600, 600, -1200, 300, 600, -600, 300, 600, -600, 300, 600, -600, 300, 1200, -600, 600, -1200]


@pytest.mark.parametrize(
    ("arrivals", "kept", "calls"),
    [
        (
            [Arrival(kept=600, passing=(1200,), joined=1200)] * 2 + [Arrival(kept=1200, passing=(2400,), joined=2400)],
            (600, 600, 1200),
            FSDP1,
        ),
        (
            [Arrival(kept=size // 2, pieces=(size,), lingers=True) for size in (1200, 600, 600, 600, 600, 1200)],
            (600, 300, 300, 300, 300, 600),
            FSDP2,
        ),
        ([Arrival(kept=5, pieces=(8, 2), waits=True)] * 2, (5, 5), [8, 2, 8, 2, 5, -8, -2, 5, -8, -2]),
        ([Arrival(kept=8, joined=8, narrow=4)] * 2, (8, 8), [8, 4, -8, 8, 4, -8, 8, -4, 8, -4]),
        ([Arrival(passing=(3, 4, 5))], (), [3, 4, -3, 5, -4, -5]),
    ],
    ids=["fsdp1", "fsdp2", "waiting", "narrow", "passing"],
)
def test_order_of_calls(arrivals: list[Arrival], kept: tuple[int, ...], calls: list[int]) -> None:
    recorder = Recorder()
    handles: dict[int, int] = {}
    load(recorder, handles, storages(*kept), arrivals)  # type: ignore[arg-type]
    assert recorder.calls == calls
    assert sorted(handles) == list(range(len(kept)))


def test_weights_come_before_the_rest() -> None:
    recorder = Recorder()
    rest = [MemoryEvent(9, 7, Owner.GRADIENTS, PERSISTENT_STAGE)]
    load(recorder, {}, [*rest, *storages(1, 2)], [Arrival(kept=1, pieces=(3,))])  # type: ignore[arg-type]
    assert recorder.calls == [2, 3, 1, -3, 7]


def test_waiting_weights_leave_their_blocks_cached() -> None:
    """Four matrices of 40 MiB are halved: what is left of them holds no tensor of 60 MiB."""
    arrivals = [Arrival(kept=20 * MIB, pieces=(40 * MIB,), waits=True)] * 4
    allocator = CachingAllocator()
    load(allocator, {}, storages(*[20 * MIB] * 4), arrivals)
    assert allocator.allocated_bytes == 80 * MIB
    assert allocator.reserved_bytes > 160 * MIB
    before = allocator.reserved_bytes
    allocator.malloc(60 * MIB)
    assert allocator.reserved_bytes == before + 60 * MIB
