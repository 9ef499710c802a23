"""FSDP1's flat parameters, counted by hand on the small step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launchkit import strategies
from launchkit.program import Owner, StepProgram
from launchkit.scenario import Precision, Sharding
from tests.strategies.small import NUM_ELEMENTS, end, most, plain, program, ranks, start

BLOCK, OUTSIDE = 64, 200  # elements of a block, and of embedding and head


def rewritten(*, num_gpus: int = 2, **overrides: Any) -> StepProgram:
    settings = plain(strategy="fsdp", **({"precision": "fp32"} | overrides))
    itemsize = 4 if settings.training.precision is Precision.FP32 else 2
    return strategies.rewrite(program(itemsize=itemsize), scenario=settings, cluster=ranks(num_gpus))


@pytest.mark.parametrize("num_gpus", [2, 4])
def test_a_rank_holds_its_share_of_every_flat_parameter(num_gpus: int) -> None:
    assert start(rewritten(num_gpus=num_gpus))[Owner.WEIGHTS] == 4 * NUM_ELEMENTS // num_gpus


def test_one_shard_is_no_sharding() -> None:
    assert start(rewritten(num_gpus=1))[Owner.WEIGHTS] == 4 * NUM_ELEMENTS
    assert start(rewritten(sharding=Sharding.NO_SHARD))[Owner.WEIGHTS] == 4 * NUM_ELEMENTS


def test_the_root_stays_gathered_and_two_blocks_are_there_at_a_time() -> None:
    """The backward pass prefetches the block before the one it runs."""
    assert most(rewritten(), Owner.GATHERED_WEIGHTS) == 4 * (OUTSIDE + 2 * BLOCK)


def test_shard_grad_op_keeps_everything_gathered() -> None:
    assert most(rewritten(sharding=Sharding.SHARD_GRAD_OP), Owner.GATHERED_WEIGHTS) == 4 * NUM_ELEMENTS


@pytest.mark.parametrize("overrides", [{}, {"precision": "bf16"}, {"sharding": Sharding.SHARD_GRAD_OP}])
def test_steps_end_as_they_began(overrides: dict[str, Any]) -> None:
    step = rewritten(**overrides)
    assert end(step) == sum(start(step).values())


def test_mixed_precision_gathers_16_bits_of_fp32_shards() -> None:
    whole, mixed = rewritten(), rewritten(precision="bf16")
    assert start(mixed)[Owner.WEIGHTS] >= start(whole)[Owner.WEIGHTS]  # each parameter begins at 16 bytes
    assert most(mixed, Owner.GATHERED_WEIGHTS) < 0.6 * most(whole, Owner.GATHERED_WEIGHTS)


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
    step = strategies.rewrite(replace(traced, groups=packed), scenario=settings, cluster=ranks(2))
    frozen, trained = 2 * 100 + 3 * 60, 3 * 4
    held = start(step)[Owner.WEIGHTS]
    assert frozen // 2 // 2 <= held <= frozen // 2 // 2 + 4 * trained + 16 * 8
