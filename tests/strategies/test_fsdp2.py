"""FSDP2's rewrite on a program small enough to count by hand.

Outside the blocks an embedding and a head of 10×4; in each block a matrix of 5×4 and a norm of 4. On two ranks the
matrix is padded to six rows, so in fp32 a block gathers 96 + 16 = 112 bytes, and what is outside 2 × 160 = 320.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest

from launchkit.hardware import Backend
from launchkit.program import (
    Alloc,
    Anchor,
    CollectiveKind,
    Event,
    Free,
    Owner,
    Parameter,
    ParameterGroup,
    Phase,
    Point,
    Section,
    Size,
    Stage,
    StepProgram,
    Stream,
    TensorRef,
)
from launchkit.scenario import Compute, DeviceKind, Split
from launchkit.simulate.expand import MemoryEvent, expand
from launchkit.strategies import fsdp2, hsdp
from tests.builders import cluster, profile, scenario

POINT = Point(2, 8, 3)


def parameter(name: str, *shape: int, **overrides: Any) -> Parameter:
    return Parameter(name=name, shape=shape, itemsize=overrides.pop("itemsize", 4), **overrides)


def gradient(slot: int, index: int, num_bytes: int) -> Alloc:
    return Alloc(slot, Size.constant(num_bytes), Owner.GRADIENTS, index)


def program(*, num_layers: int = 3, itemsize: int = 4, tied: bool = False, lora: bool = False) -> StepProgram:
    """A step of ``num_layers`` blocks that keeps 40 bytes per block; with ``lora`` only adapters are trained."""
    act, logits = Size.constant(40), Size.constant(24)
    matrix, norm = 20 * itemsize, 4 * itemsize
    block = [parameter("w", 5, 4, itemsize=itemsize, trainable=not lora), parameter("norm", 4, itemsize=itemsize)]
    backward_block: list[Event] = [gradient(0, 0, matrix), gradient(1, 1, norm)]
    root_gradients: tuple[Event, ...] = (gradient(0, 1, 40 * itemsize),)
    if lora:
        block = [parameter("w", 5, 4, itemsize=itemsize, trainable=False)]
        block.append(parameter("lora_A", 1, 4, itemsize=itemsize, lora_rank_axis=0))
        backward_block = [gradient(0, 1, 3 * 4 * itemsize)]
        root_gradients = ()
    root = [parameter("embed", 10, 4, itemsize=itemsize, trainable=not lora)]
    if not tied:
        root.append(parameter("head", 10, 4, itemsize=itemsize, trainable=not lora))
    head = len(root) - 1
    freed = Free(TensorRef("forward.layers", Anchor.RELATIVE, 0, 0), act)
    embedding_gradient = () if lora or tied else (gradient(0, 0, 40 * itemsize),)
    if tied and not lora:
        root_gradients = (gradient(0, 0, 40 * itemsize),)
    sections = (
        Section(events=(), uses=(0,)),
        Section(events=(Alloc(0, act, Owner.ACTIVATIONS),), group="Block", uses=(0, 1)),
        Section(events=(Alloc(0, logits, Owner.LOGITS),), uses=(head,)),
        Section(events=(Free(TensorRef("forward.1", Anchor.FIRST, 0, 0), logits), *root_gradients), uses=(head,)),
        Section(events=(*backward_block, freed), group="Block", uses=(0, 1)),
        Section(events=embedding_gradient, uses=(0,)),
    )
    blocks = {"stack": "layers"}
    return StepProgram(
        stages=(
            Stage(name="forward.0", phase=Phase.FORWARD, layers=(0,)),
            Stage(name="forward.layers", phase=Phase.FORWARD, layers=(1,) * num_layers, **blocks),
            Stage(name="forward.1", phase=Phase.LOSS, layers=(2,)),
            Stage(name="backward.1", phase=Phase.BACKWARD, layers=(3,)),
            Stage(name="backward.layers", phase=Phase.BACKWARD, layers=(4,) * num_layers, reverse=True, **blocks),
            Stage(name="backward.0", phase=Phase.BACKWARD, layers=(5,)),
        ),
        sections=sections,
        groups={
            "root": ParameterGroup(name="root", parameters=tuple(root)),
            "Block": ParameterGroup(name="Block", parameters=tuple(block)),
        },
        group_counts={"root": 1, "Block": num_layers},
    )


def rewritten(
    *, num_gpus: int = 2, num_nodes: int = 1, cpu: bool = False, traced: StepProgram | None = None, **overrides: Any
) -> StepProgram:
    values: dict[str, Any] = {"strategy": "fsdp2", "trainer": "loop", "precision": "fp32", "optimizer": "sgd"}
    ranks = cluster(num_gpus=num_gpus, num_nodes=num_nodes, **({"backend": Backend.CPU} if cpu else {}))
    return fsdp2.rewrite(traced or program(), scenario=scenario(**(values | overrides)), cluster=ranks)


def most(rewritten_program: StepProgram, owner: Owner) -> int:
    """The most that is ever live of one owner."""
    return max(accumulate(event.delta_bytes for event in events(rewritten_program) if event.owner is owner), default=0)


def events(rewritten_program: StepProgram) -> Iterator[MemoryEvent]:
    return expand(rewritten_program, POINT)


def peak(rewritten_program: StepProgram) -> int:
    return max(accumulate(event.delta_bytes for event in events(rewritten_program)))


def persistent(rewritten_program: StepProgram, owner: Owner) -> int:
    return sum(p.size.at(POINT) * p.count for p in rewritten_program.persistent if p.owner is owner)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 3 * (48 + 8) + 160),
        ({"num_gpus": 5}, 3 * (16 + 4) + 2 * 32),
        ({"num_gpus": 64}, 3 * (16 + 4) + 2 * 16),  # a row is the least that a first rank holds
        ({"num_gpus": 1}, 3 * (80 + 16) + 320),
        ({"num_gpus": 2, "num_nodes": 2}, 3 * (32 + 4) + 96),
        ({"num_gpus": 2, "num_nodes": 2, "sharding": "hybrid_shard"}, 3 * (48 + 8) + 160),
        ({"precision": "bf16", "traced": program(itemsize=2)}, 3 * (48 + 8) + 160),
        ({"precision": "bf16-pure", "traced": program(itemsize=2)}, 3 * (24 + 4) + 80),
        ({"offload": "all"}, 0),
    ],
)
def test_weights_are_the_first_ranks_padded_rows_in_the_dtype_that_is_held(
    settings: dict[str, Any], expected: int
) -> None:
    assert persistent(rewritten(**settings), Owner.WEIGHTS) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 320 + 112),  # the root's all the time, one block's at a time
        ({"sharding": "shard_grad_op"}, 320 + 3 * 112),
        ({"precision": "bf16", "traced": program(itemsize=2)}, 160 + 56),
        ({"num_gpus": 1}, 320 + 96),
        ({"traced": program(tied=True)}, 160 + 112),
        ({"trainer": "hf"}, 160),  # accelerate gathers embedding, blocks and head apart
        ({"trainer": "hf", "sharding": "shard_grad_op"}, 2 * 160 + 3 * 112),
        ({"trainer": "hf", "traced": program(tied=True)}, 160 + 112),
    ],
)
def test_gathered_weights_follow_the_units_and_resharding(settings: dict[str, Any], expected: int) -> None:
    assert most(rewritten(**settings), Owner.GATHERED_WEIGHTS) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 320 + 112),  # the root's buffer until the first block is copied out
        ({"cpu": True}, 320 + 320),  # gloo copies what it gathers
        ({"precision": "bf16", "traced": program(itemsize=2)}, 160 + 56 + 28),  # and the flat input of the cast
        ({"num_gpus": 1}, 320),  # no all-gather; the root's reduce input remains
        ({"trainer": "hf"}, 160 + 112),
    ],
)
def test_communication_buffers_overlap_as_the_engine_frees_them(settings: dict[str, Any], expected: int) -> None:
    assert most(rewritten(**settings), Owner.COMMUNICATION) == expected


def test_what_other_streams_make() -> None:
    """The gather's buffers and what a reduction puts out; copies and its input are made where the step computes."""
    made = [event for event in expand(rewritten(precision="bf16"), POINT) if event.delta_bytes > 0]
    assert {(event.owner, event.stream) for event in made if event.stream} == {
        (Owner.COMMUNICATION, Stream.GATHER),
        (Owner.COMMUNICATION, Stream.REDUCE),
        (Owner.GRADIENTS, Stream.REDUCE),
    }
    assert not any(event.lag for event in made)


def float8_program() -> StepProgram:
    """The step in 16 bits whose blocks' matrices are torchao's, gathered in 8."""
    traced = program(itemsize=2)
    matrix, norm = traced.groups["Block"].parameters
    block = replace(traced.groups["Block"], parameters=(replace(matrix, itemsize=1), norm))
    return replace(traced, groups={**traced.groups, "Block": block})


@pytest.mark.parametrize(
    ("owner", "expected"),
    [
        (Owner.GATHERED_WEIGHTS, 160 + 24 + 8),  # the matrix's six rows in 8 bits, the norm in 16
        # beside the root's buffer: a shard in fp32 twice, scaled and clamped, while it is cast to 8 bits
        (Owner.COMMUNICATION, 160 + 48 + 48 + 12),
    ],
)
def test_torchaos_weights_are_cast_before_they_are_gathered(owner: Owner, expected: int) -> None:
    assert most(rewritten(precision="fp8", traced=float8_program()), owner) == expected


def test_the_gradient_of_a_weight_gathered_in_8_bits_is_reduced_in_16() -> None:
    blocks = [rewritten(precision="fp8", traced=traced) for traced in (float8_program(), program(itemsize=2))]
    sent = [
        [c.num_bytes for s in each.sections for c in s.collectives if c.kind is CollectiveKind.REDUCE_SCATTER]
        for each in blocks
    ]
    assert sent[0] == sent[1] != []
    assert persistent(blocks[0], Owner.WEIGHTS) == persistent(blocks[1], Owner.WEIGHTS)


def test_what_a_cast_takes_is_given_back() -> None:
    live: dict[int, int] = {}
    for event in events(rewritten(precision="fp8", traced=float8_program())):
        live[event.owner] = live.get(event.owner, 0) + event.delta_bytes
    assert live[Owner.COMMUNICATION] == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # two gradients of the root, the shards of two blocks, and the last block's gradients whole
        ({}, 160 + 160 + 3 * 56),
        # the head's is reduced before the blocks; the embedding's, the last of its unit, lives beside what it becomes
        ({"trainer": "hf"}, 160 + 2 * 80 + 3 * 56),
        # no_sync: all of them, whole, and the head's shard beside it
        ({"trainer": "hf", "gradient_accumulation_steps": 4}, 2 * 160 + 3 * 96 + 80),
        ({"traced": program(lora=True), "method": "lora", "lora_rank": 3}, 3 * 32 + 48),
    ],
)
def test_unsharded_gradients_die_when_they_are_copied_and_the_last_of_a_unit_when_it_is_reduced(
    settings: dict[str, Any], expected: int
) -> None:
    assert most(rewritten(**settings), Owner.GRADIENTS) == expected


def test_the_loop_reduces_each_micro_batch_and_adds_to_sharded_gradients() -> None:
    accumulated = rewritten(gradient_accumulation_steps=4)
    assert persistent(accumulated, Owner.GRADIENTS) == 3 * 56 + 160
    assert persistent(rewritten(), Owner.GRADIENTS) == 0


def test_replicas_keep_the_buffers_of_their_all_reduces_until_the_backward_ends() -> None:
    traced = program(itemsize=2)
    sharded = rewritten(precision="bf16", traced=traced, num_gpus=2)
    hybrid = rewritten(precision="bf16", traced=traced, num_gpus=2, num_nodes=2, sharding="hybrid_shard")
    assert peak(hybrid) > peak(sharded)
    kinds = {collective.kind for section in hybrid.sections for collective in section.collectives}
    assert kinds == {CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_REDUCE}


def test_frozen_units_are_gathered_and_never_reduced() -> None:
    frozen = rewritten(traced=program(lora=True), method="lora", lora_rank=3)
    payloads = [
        collective.num_bytes.at(POINT)
        for section in frozen.sections
        for collective in section.collectives
        if collective.kind is CollectiveKind.REDUCE_SCATTER
    ]
    assert set(payloads) == {2 * 2 * 16}  # three rows of 16 bytes, padded to four


def test_offloading_moves_shards_gradients_and_optimizer_to_the_host() -> None:
    offloaded = rewritten(offload="all", optimizer="adamw_torch_fused")
    shards = 3 * 56 + 160
    states = 2 * shards + 4 * (3 * 2 + 2)
    assert offloaded.host_persistent_bytes == shards + shards + states
    assert persistent(offloaded, Owner.OPTIMIZER_STATES) == 0
    assert {copy.to_device for section in offloaded.sections for copy in section.copies} == {True, False}


@pytest.mark.parametrize("trainer", ["loop", "hf"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
@pytest.mark.parametrize("sharding", ["full_shard", "shard_grad_op", "hybrid_shard"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("offload", ["none", "all"])
def test_a_steady_step_ends_as_it_began(trainer: str, precision: str, sharding: str, steps: int, offload: str) -> None:
    traced = program(itemsize=4 if precision == "fp32" else 2)
    built = rewritten(
        traced=traced,
        trainer=trainer,
        precision=precision,
        sharding=sharding,
        gradient_accumulation_steps=steps,
        offload=offload,
        num_gpus=2,
        num_nodes=2,
        optimizer="adamw_torch_fused",
    )
    kept_gradients = persistent(built, Owner.GRADIENTS)  # of the micro-batches before, gone with zero_grad
    start = sum(p.size.at(POINT) * p.count for p in built.persistent)
    assert sum(event.delta_bytes for event in events(built)) == start - kept_gradients


def test_more_ranks_never_hold_more_between_steps() -> None:
    held = [sum(p.size.at(POINT) * p.count for p in rewritten(num_gpus=n).persistent) for n in (1, 2, 3, 5, 8, 64)]
    assert held == sorted(held, reverse=True)


def test_depth_adds_no_sections() -> None:
    """All but the ends of a stack share one section, so a deep model's program stays small."""
    assert len(rewritten(traced=program(num_layers=80)).sections) == len(rewritten(traced=program()).sections)


@pytest.mark.parametrize(
    ("trainer", "precision", "expected"),
    [
        ("loop", "fp32", Compute.FP32),
        ("loop", "bf16", Compute.BF16),
        ("loop", "bf16-params", Compute.BF16_AUTOCAST),
        ("hf", "bf16", Compute.BF16),
        ("hf", "bf16-params", Compute.BF16),
        ("hf", "bf16-pure", Compute.BF16),
        ("hf", "fp16", Compute.FP16),
        ("trl", "bf16", Compute.BF16),
    ],
)
def test_blocks_compute_on_gathered_weights(trainer: str, precision: str, expected: Compute) -> None:
    built = scenario(strategy="fsdp2", trainer=trainer, precision=precision)
    assert fsdp2.trace_key(built.training, built.strategy, DeviceKind.CPU).compute is expected


def test_what_transformers_shards_itself_computes_under_autocast() -> None:
    built = scenario(strategy="fsdp2", trainer="hf", precision="bf16", split=Split(tp=2))
    assert fsdp2.trace_key(built.training, built.strategy, DeviceKind.CPU).compute is Compute.BF16_AUTOCAST


@pytest.mark.parametrize(
    ("settings", "next_step"),
    [
        ({"offload": "optimizer"}, "--offload all"),
        ({"offload": "nvme"}, "--offload all"),
        ({"sharding": "no_shard"}, "--strategy ddp"),
        ({"optimizer": "adamw_bnb_8bit"}, "adamw_torch_8bit"),
        ({"precision": "bf16-params", "trainer": "hf"}, "--precision bf16 or bf16-pure"),
        ({"sharding": "hybrid_shard", "shard_group_size": 3}, "choose a divisor"),
    ],
)
def test_what_the_engine_refuses_is_said_with_what_to_type(settings: dict[str, Any], next_step: str) -> None:
    refused = fsdp2.refusal(scenario(strategy="fsdp2", **settings), profile(), cluster(num_gpus=4))
    assert refused is not None and next_step in refused


@pytest.mark.parametrize("settings", [{}, {"offload": "all"}, {"precision": "bf16-params", "trainer": "loop"}])
def test_what_the_engine_takes_is_not_refused(settings: dict[str, Any]) -> None:
    assert fsdp2.refusal(scenario(strategy="fsdp2", **settings), profile(), cluster(num_gpus=4)) is None


@pytest.mark.parametrize(("num_nodes", "is_refused"), [(1, True), (2, False)])
def test_hsdp_needs_a_second_shard_group(num_nodes: int, is_refused: bool) -> None:
    refused = hsdp.refusal(scenario(strategy="hsdp"), profile(), cluster(num_gpus=4, num_nodes=num_nodes))
    assert (refused is not None and "--strategy fsdp2" in refused) is is_refused


def test_hsdp_is_fsdp2_with_hybrid_sharding() -> None:
    settings: dict[str, Any] = {"num_gpus": 2, "num_nodes": 2, "precision": "bf16", "traced": program(itemsize=2)}
    assert rewritten(strategy="hsdp", **settings) == rewritten(sharding="hybrid_shard", **settings)


@pytest.mark.parametrize(
    ("flags", "first_event"),
    [
        ({"trainer": "loop"}, Alloc),
        ({"trainer": "hf"}, Free),
        ({"trainer": "trl", "loss": "chunked"}, Alloc),
        ({"trainer": "hf", "loss": "liger"}, Alloc),
    ],
    ids=str,
)
def test_the_last_block_is_prefetched_when_the_unit_behind_it_begins_its_backward(
    flags: dict[str, str], first_event: type[Event]
) -> None:
    """The root's backward begins with the loss, the head's after what its logits' gradient leaves behind, unless a
    fused loss reads the head without calling it."""
    built = rewritten(**flags)
    section = built.section_of(built.stage("backward.1"), 0)
    assert isinstance(section.events[0], first_event)
