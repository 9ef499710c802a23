"""What holds for every scenario: more tokens take more, more GPUs shard further, the parts sum to the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchkit import planner
from launchkit.plan import Estimate
from launchkit.planner.evaluate import Bench
from launchkit.program import Owner
from tests.builders import cluster, scenario
from tests.planner.sources import WrittenSource

SHARDED = ("fsdp2", "zero2", "zero3")
SPREAD = ("single", "ddp", *SHARDED)
STATES = (Owner.WEIGHTS, Owner.MASTER_WEIGHTS, Owner.OPTIMIZER_STATES)


def estimated(*, num_gpus: int, backend: str = "cuda", **fields: Any) -> Estimate:
    spread = cluster(num_gpus=num_gpus, backend=backend)
    return planner.estimate(WrittenSource(3), cluster=spread, scenario=scenario(**fields)).estimate


def requested(**fields: Any) -> tuple[int, int]:
    """The most bytes alive at once: on CUDA, of blocks rounded to 512 bytes, and on CPU, to the byte.

    The laws hold of what a step asks for. What CUDA's allocator hands out may be less for a larger request: a block
    whose remainder is too small to be split off counts whole, as in torch.
    """
    bench = Bench(source=WrittenSource(3), cluster=cluster(num_gpus=2))
    on_cpu = estimated(num_gpus=2, backend="cpu", **fields)
    return bench.live_peak_bytes(scenario(**fields)), on_cpu.allocated_peak_bytes


@given(
    strategy=st.sampled_from(SPREAD),
    method=st.sampled_from(["full", "lora"]),
    checkpointing=st.sampled_from(["none", "full"]),
    micro_batch=st.integers(2, 8),
    lengths=st.tuples(st.integers(16, 4096), st.integers(16, 4096)),
)
@settings(max_examples=40, deadline=None)
def test_more_tokens_never_take_less(lengths: tuple[int, int], **fields: Any) -> None:
    shorter, longer = (requested(seq_len=length, **fields) for length in sorted(lengths))
    assert shorter[0] <= longer[0]
    assert shorter[1] <= longer[1]
    allocated = estimated(num_gpus=2, seq_len=min(lengths), **fields)
    assert allocated.reserved_peak_bytes >= allocated.allocated_peak_bytes


@given(
    strategy=st.sampled_from(SPREAD),
    method=st.sampled_from(["full", "lora"]),
    sizes=st.tuples(st.integers(2, 16), st.integers(2, 16)),
)
@settings(max_examples=20, deadline=None)
def test_more_sequences_never_take_less(sizes: tuple[int, int], **fields: Any) -> None:
    fewer, more = (requested(micro_batch=size, **fields) for size in sorted(sizes))
    assert fewer[0] <= more[0]
    assert fewer[1] <= more[1]


@given(strategy=st.sampled_from(SHARDED), counts=st.tuples(st.integers(2, 64), st.integers(2, 64)))
@settings(max_examples=25, deadline=None)
def test_more_gpus_never_raise_a_sharded_term(strategy: str, counts: tuple[int, int]) -> None:
    fewer, more = (estimated(num_gpus=count, strategy=strategy) for count in sorted(counts))
    for owner in STATES:
        assert more.at_peak[owner] <= fewer.at_peak[owner], owner


@pytest.mark.parametrize("strategy", SPREAD)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_parts_sum_to_the_allocated_peak(strategy: str, method: str) -> None:
    found = estimated(num_gpus=4, strategy=strategy, method=method)
    assert set(found.at_peak) == {*map(str, Owner), "cuda_context", "nccl", "fragmentation"}
    assert sum(found.at_peak[str(owner)] for owner in Owner) == found.allocated_peak_bytes
    assert found.at_peak["fragmentation"] == found.reserved_peak_bytes - found.allocated_peak_bytes
    assert sum(found.at_peak.values()) == found.device_peak_bytes


def test_only_several_gpus_have_buffers_of_a_communicator() -> None:
    assert estimated(num_gpus=1).at_peak["nccl"] == 0
    assert estimated(num_gpus=4, strategy="ddp").at_peak["nccl"] > 0


def test_a_compiled_step_lies_between_full_checkpointing_and_the_eager_one() -> None:
    fields = {"num_gpus": 1, "strategy": "single", "seq_len": 2048, "micro_batch": 4}
    eager, compiled = estimated(**fields), estimated(**fields, compile=True)
    least = estimated(**fields, checkpointing="full")
    assert compiled.device_peak_bytes == eager.device_peak_bytes
    assert compiled.device_peak_high_bytes == eager.device_peak_high_bytes
    saved = eager.allocated_peak_bytes - least.allocated_peak_bytes
    assert saved > 0
    assert compiled.device_peak_low_bytes == pytest.approx(eager.device_peak_low_bytes - saved, rel=0.01)
    checkpointed = estimated(**fields, checkpointing="full", compile=True)
    assert checkpointed.device_peak_low_bytes == least.device_peak_low_bytes


def test_a_compiled_step_says_what_its_range_means() -> None:
    source, one = WrittenSource(3), cluster(num_gpus=1)
    notes = planner.estimate(source, cluster=one, scenario=scenario(strategy="single", compile=True)).notes
    assert any("the peak is the eager step's" in note for note in notes)
