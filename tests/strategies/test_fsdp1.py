"""FSDP1's rewrite on a step small enough to count by hand.

In fp32 a block's flat parameter has 60 + 4 = 64 elements, so 256 bytes, and what is outside 200, so 800. Where the
sizes matter they are those of two ranks: shards of 128 and 400 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from launchkit.program import (
    Alloc,
    Anchor,
    CollectiveKind,
    Free,
    Owner,
    Section,
    Size,
    StepProgram,
    Stream,
    TensorRef,
    Term,
)
from launchkit.scenario import Compute, DeviceKind, Sharding
from launchkit.simulate.expand import expand
from launchkit.strategies import fsdp1
from tests.builders import cluster, profile, scenario
from tests.strategies.small import POINT, end, most, peak, plain, program, ranks, start
from tests.strategies.test_fsdp2 import program as with_adapters

BLOCK, ROOT = 256, 800


def rewritten(
    *, num_gpus: int = 2, num_nodes: int = 1, cpu: bool = False, traced: StepProgram | None = None, **overrides: Any
) -> StepProgram:
    hardware = ranks(num_gpus, cpu=cpu) if num_nodes == 1 else cluster(num_gpus=num_gpus, num_nodes=num_nodes)
    return fsdp1.rewrite(traced or program(), scenario=plain(**({"strategy": "fsdp"} | overrides)), cluster=hardware)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 3 * 128 + 400),
        ({"num_gpus": 3}, 3 * 4 * 22 + 4 * 67),  # 66 and 201 elements, padded to the number of ranks
        ({"num_gpus": 3, "use_orig_params": False}, 3 * 4 * 22 + 4 * 67),  # the shards alone are made equal
        ({"num_gpus": 1}, 3 * BLOCK + ROOT),
        ({"sharding": "no_shard"}, 3 * BLOCK + ROOT),
        ({"sharding": "shard_grad_op"}, 3 * 128 + 400),
        ({"num_nodes": 2}, 3 * 64 + 200),
        ({"num_nodes": 2, "sharding": "hybrid_shard"}, 3 * 128 + 400),
        # in bf16 16 bytes are 8 elements, so that the second parameters begin at 64 and 104
        ({"precision": "bf16", "traced": program(itemsize=2)}, 4 * (3 * 34 + 102)),
        ({"precision": "bf16-pure", "traced": program(itemsize=2)}, 2 * (3 * 34 + 102)),
        ({"offload": "all"}, 0),
    ],
)
def test_a_rank_holds_its_part_of_each_flat_parameter(settings: dict[str, Any], expected: int) -> None:
    assert start(rewritten(**settings)).get(Owner.WEIGHTS, 0) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ROOT + 2 * BLOCK),  # the prefetch makes it two blocks in the backward pass
        ({"backward_prefetch": "none"}, ROOT + BLOCK),
        ({"backward_prefetch": "post"}, ROOT + BLOCK),  # the next one comes when this one is gone
        ({"backward_prefetch": "none", "forward_prefetch": True}, ROOT + 2 * BLOCK),
        ({"backward_prefetch": "none", "forward_prefetch": True, "state": "first"}, ROOT + BLOCK),
        ({"sharding": "shard_grad_op"}, ROOT + 3 * BLOCK),
        ({"sharding": "no_shard"}, 0),  # nothing is gathered, and nothing cast in fp32
        ({"sharding": "no_shard", "precision": "bf16", "traced": program(itemsize=2)}, 2 * (204 + 2 * 68)),
        ({"num_gpus": 3}, 3 * 4 * (67 + 2 * 22)),
        ({"precision": "bf16", "traced": program(itemsize=2)}, 2 * (204 + 2 * 68)),
    ],
)
def test_gathered_weights_follow_prefetch_and_resharding(settings: dict[str, Any], expected: int) -> None:
    assert most(rewritten(**settings), Owner.GATHERED_WEIGHTS) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ROOT),  # the root's flat gradient, reduced in the dtype of the shards
        ({"cpu": True}, ROOT + ROOT),  # gloo copies what it reduces
        ({"num_gpus": 3, "use_orig_params": False}, ROOT + 4 * 201),  # 200 elements are padded to three shards
        ({"precision": "bf16", "traced": program(itemsize=2)}, 2 * 204 + 2 * 102),  # the shard before its cast
    ],
)
def test_gradients_are_reduced_through_flat_buffers(settings: dict[str, Any], expected: int) -> None:
    assert most(rewritten(**settings), Owner.COMMUNICATION) == expected


def test_what_other_streams_make_and_read() -> None:
    """Gathered weights wait for the computation, the flat gradient for its reduction too; nothing else lags."""
    mixed = rewritten(precision="bf16", traced=program(itemsize=2))
    made = {(event.owner, event.stream, event.lag) for event in expand(mixed, POINT) if event.delta_bytes > 0}
    assert {row for row in made if row[1] or row[2]} == {
        (Owner.COMMUNICATION, Stream.SHARD, 2),
        (Owner.GATHERED_WEIGHTS, Stream.GATHER, 2),
        (Owner.COMMUNICATION, Stream.COMPUTE, 3),
        (Owner.COMMUNICATION, Stream.REDUCE, 0),
        (Owner.GRADIENTS, Stream.REDUCE, 0),
    }


def test_all_gradients_of_a_unit_live_until_they_are_flattened() -> None:
    """The head's waits for the embedding's; at the end both are whole beside the shards of the blocks."""
    assert most(rewritten(), Owner.GRADIENTS) == 400 + 400 + 3 * 128


def test_whole_gradients_pile_up_flat_under_no_sync_and_shards_otherwise() -> None:
    piled = rewritten(trainer="hf", gradient_accumulation_steps=4)
    added = rewritten(gradient_accumulation_steps=4)
    assert start(added)[Owner.GRADIENTS] == 3 * 128 + 400
    assert Owner.GRADIENTS not in start(piled)
    assert most(piled, Owner.GRADIENTS) >= 3 * BLOCK + ROOT


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, {CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER}),
        ({"sharding": "no_shard"}, {CollectiveKind.ALL_REDUCE}),
        ({"num_gpus": 1}, set()),
        (
            {"num_nodes": 2, "sharding": "hybrid_shard_zero2"},
            {CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_REDUCE},
        ),
    ],
)
def test_messages(settings: dict[str, Any], kinds: set[CollectiveKind]) -> None:
    assert {message.kind for section in rewritten(**settings).sections for message in section.collectives} == kinds


def test_offloaded_gradients_stay_on_the_device_until_the_backward_ends() -> None:
    offloaded = rewritten(offload="all")
    assert most(offloaded, Owner.GRADIENTS) == most(rewritten(), Owner.GRADIENTS)
    assert Owner.OPTIMIZER_STATES not in start(offloaded)
    assert offloaded.host_persistent_bytes >= 3 * (3 * 128 + 400)


@pytest.mark.parametrize("trainer", ["loop", "hf"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
@pytest.mark.parametrize("sharding", list(Sharding))
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("offload", ["none", "all"])
@pytest.mark.parametrize("is_lora", [False, True])
def test_a_steady_step_ends_as_it_began(
    trainer: str, precision: str, sharding: str, steps: int, offload: str, is_lora: bool
) -> None:
    built = rewritten(
        traced=with_adapters(itemsize=4 if precision == "fp32" else 2, lora=is_lora),
        trainer=trainer,
        precision=precision,
        sharding=sharding,
        gradient_accumulation_steps=steps,
        offload=offload,
        num_nodes=2,
        method="lora" if is_lora else "full",
        lora_rank=3,
    )
    before = start(built)
    assert end(built) == sum(before.values()) - before.get(Owner.GRADIENTS, 0)  # those of micro-batches before


def adapted(**overrides: Any) -> StepProgram:
    """Each block has a frozen matrix of 20 elements and an adapter of 3 × 4."""
    return rewritten(traced=with_adapters(lora=True), method="lora", lora_rank=3, **overrides)


def test_adapters_are_flattened_with_frozen_weights_or_are_units_of_their_own() -> None:
    assert start(adapted())[Owner.WEIGHTS] == 3 * 64 + 160  # 20 + 12 elements in one
    assert start(adapted(trainer="hf"))[Owner.WEIGHTS] == 3 * (40 + 24) + 160


def test_only_trained_units_are_reduced() -> None:
    sent = {
        message.num_bytes.at(POINT)
        for section in adapted(trainer="hf").sections
        for message in section.collectives
        if message.kind is CollectiveKind.REDUCE_SCATTER
    }
    assert sent == {48}


def test_the_first_frozen_block_keeps_its_weights_to_the_end() -> None:
    """Nothing before it is trained, so that no gradient of its input says that its backward is over."""
    freed = dict(_ends_of_weights(adapted(trainer="hf")))
    assert freed == {"backward.0": 2, "backward.layers": 2}  # with the root's


def _ends_of_weights(built: StepProgram) -> Iterator[tuple[str, int]]:
    counts: dict[str, int] = {}
    for event in expand(built, POINT):
        if event.owner is Owner.GATHERED_WEIGHTS and event.delta_bytes in (-80, -160, -320):
            stage = built.stages[event.stage].name
            if stage.startswith("backward"):
                counts[stage] = counts.get(stage, 0) + 1
    yield from counts.items()


def test_the_rank_with_most_to_train_is_shown() -> None:
    """A block's adapter lies behind the matrix, so that the last of two ranks has most of it: 12 of 16 elements."""
    assert start(adapted())[Owner.OPTIMIZER_STATES] == 3 * (2 * 4 * 12 + 4)


def test_autocasts_copies_of_adapters_are_left_out_where_they_are_gathered_in_16_bits() -> None:
    traced = with_adapters(lora=True, itemsize=2)
    copy = Size((Term(8, lora_rank=1),))
    cast = Section(events=(Alloc(0, copy, Owner.ACTIVATIONS),), uses=(0,))
    freed = Section(events=(Free(TensorRef("forward.0", Anchor.FIRST, 0, 0), copy),), uses=(0,))
    sections = (cast, *traced.sections[1:-1], freed)
    settings: dict[str, Any] = {"method": "lora", "lora_rank": 3, "trainer": "hf", "precision": "bf16"}
    assert peak(rewritten(traced=traced.with_sections(sections), **settings)) == peak(
        rewritten(traced=traced, **settings)
    )


@pytest.mark.parametrize(
    ("settings", "compute", "casts", "flattens"),
    [
        ({"trainer": "loop", "precision": "bf16"}, Compute.BF16, False, False),
        ({"trainer": "loop", "precision": "bf16", "method": "lora"}, Compute.BF16, True, True),
        ({"trainer": "hf", "precision": "bf16", "method": "lora"}, Compute.BF16_AUTOCAST, False, False),
        ({"trainer": "hf", "precision": "fp16"}, Compute.FP16_AUTOCAST, False, False),
        ({"trainer": "hf", "precision": "fp32", "method": "lora"}, Compute.FP32, False, False),
        ({"trainer": "hf", "precision": "bf16-params", "method": "qlora"}, Compute.BF16_AUTOCAST, True, False),
    ],
)
def test_what_is_traced(settings: dict[str, Any], compute: Compute, casts: bool, flattens: bool) -> None:
    built = scenario(strategy="fsdp", **settings)
    key = fsdp1.trace_key(built.training, built.strategy, DeviceKind.CPU)
    assert (key.compute, key.cast_adapters, key.flat_gradients) == (compute, casts, flattens)


@pytest.mark.parametrize(
    ("settings", "next_step"),
    [
        ({"offload": "nvme"}, "--offload all"),
        ({"method": "lora", "trainer": "loop", "use_orig_params": False}, "set it to true"),
    ],
)
def test_what_the_engine_refuses_is_said_with_what_to_type(settings: dict[str, Any], next_step: str) -> None:
    refused = fsdp1.refusal(scenario(strategy="fsdp", **settings), profile(), cluster(num_gpus=4))
    assert refused is not None and next_step in refused


@pytest.mark.parametrize("settings", [{}, {"sharding": "no_shard"}, {"method": "lora", "trainer": "hf"}])
def test_what_the_engine_takes_is_not_refused(settings: dict[str, Any]) -> None:
    assert fsdp1.refusal(scenario(strategy="fsdp", **settings), profile(), cluster(num_gpus=4)) is None


def test_4_bit_weights_are_sharded_by_their_packed_bytes() -> None:
    """Two to a byte, in storage of two bytes: the shards of two ranks hold them all, and scales are on both."""
    traced = program(itemsize=2, frozen=True)
    packed = {
        name: replace(
            group,
            parameters=tuple(
                p if p.trainable else replace(p, itemsize=1, packed_bytes=p.numel() // 2) for p in group.parameters
            ),
        )
        for name, group in traced.groups.items()
    }
    settings = plain(strategy="fsdp", precision="bf16-params", method="qlora", trainer="hf")
    step = fsdp1.rewrite(replace(traced, groups=packed), scenario=settings, cluster=ranks(2))
    frozen, trained = 2 * 100 + 3 * 60, 3 * 4
    held = start(step)[Owner.WEIGHTS]
    assert frozen // 2 // 2 <= held <= frozen // 2 // 2 + 4 * trained + 16 * 8


def test_after_a_forward_prefetch_a_block_ends_behind_the_next() -> None:
    """Three blocks' weights at a time in the backward pass, as two gloo processes had them."""
    assert most(rewritten(forward_prefetch=True), Owner.GATHERED_WEIGHTS) == ROOT + 3 * BLOCK


def test_without_a_rate_limit_a_gpu_is_refused() -> None:
    asked = scenario(strategy="fsdp", limit_all_gathers=False)
    on_gpus = fsdp1.refusal(asked, profile(), cluster(num_gpus=2))
    assert on_gpus is not None and "leave it out" in on_gpus
    assert fsdp1.refusal(asked, profile(), cluster(num_gpus=2, backend="cpu")) is None


def test_without_wrapping_the_model_is_one_unit() -> None:
    """All weights and all gradients are there at the end of the backward pass, where they become one flat gradient."""
    one = rewritten(wrap="model", use_orig_params=False)
    assert most(one, Owner.GATHERED_WEIGHTS) == ROOT + 3 * BLOCK
    asked = scenario(strategy="fsdp", wrap="model", method="lora")
    found = fsdp1.refusal(asked, profile(), cluster(num_gpus=2))
    assert found is not None and "--method full" in found
