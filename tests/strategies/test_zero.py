"""ZeRO's rewrites, counted by hand, and the replay of ZeRO-3's parameter coordinator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchkit import strategies
from launchkit.program import Alloc, CollectiveKind, Owner, Phase, Section, Size, Stage, StepProgram, Stream
from launchkit.scenario import DeviceKind
from launchkit.strategies.zero3_fetch import FetchSettings, ModuleReading, ModuleUse, PlaceReading, replay
from launchkit.strategies.zero3_gather import Level, Module, Segment, segments
from launchkit.strategies.zero_flat import Flat, Span, reduce_copies
from launchkit.strategies.zero_job import EventList, Placed
from tests.builders import profile
from tests.strategies.small import NUM_ELEMENTS, POINT, end, most, peak, plain, program, ranks, start

BUCKET = 300  # elements; the model has 392


def rewritten(strategy: str, *, num_gpus: int = 2, cpu: bool = False, **overrides: Any) -> StepProgram:
    values = {"precision": "bf16", "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 10}
    settings = plain(strategy=strategy, **(values | overrides))
    itemsize = 4 if settings.training.precision == "fp32" else 2
    return strategies.rewrite(program(itemsize=itemsize), scenario=settings, cluster=ranks(num_gpus, cpu=cpu))


@pytest.mark.parametrize(
    ("numels", "world_size", "expected"),
    [
        ((8,), 2, (8, 4, 8, 4, 8)),
        ((5, 5), 2, (12, 6, 10, 5, 5)),
        ((4, 4), 2, (8, 4, 4, 4, 4)),
        ((3, 10, 3), 4, (16, 4, 13, 4, 10)),
        ((1,), 8, (16, 2, 1, 1, 1)),
    ],
)
def test_flat_partition(numels: tuple[int, ...], world_size: int, expected: tuple[int, ...]) -> None:
    flat = Flat.of([placed(numels)], world_size)
    found = (flat.total, flat.partition, flat.gradient_buffer, flat.largest_slice, flat.largest_parameter)
    assert found == expected


def placed(numels: Sequence[int]) -> tuple[Placed, ...]:
    return tuple(Placed(("layers", 0, index), numel) for index, numel in enumerate(numels))


def test_groups_of_the_optimizer_are_flattened_apart() -> None:
    first, second = placed((5, 5)), (Placed(("layers", 1, 0), 3),)
    assert Flat.of([first, second], 2).totals == (12, 4)


@pytest.mark.parametrize(
    ("spans", "copies"),
    [
        ([(0, 40), (0, 40)], ()),  # one rank's: reduced where they lie
        ([(0, 40), (1, 40)], (80,)),
        ([(0, 60), (1, 60), (0, 60)], (120,)),  # two are more than the bucket holds; the third is alone
    ],
)
def test_what_a_flush_copies(spans: list[tuple[int, int]], copies: tuple[int, ...]) -> None:
    assert reduce_copies([Span(*span) for span in spans], capacity=100) == copies


@given(numels=st.lists(st.integers(1, 1000), min_size=1), world_size=st.integers(1, 16))
def test_partitions_hold_everything(numels: list[int], world_size: int) -> None:
    flat = Flat.of([placed(numels)], world_size)
    assert flat.partition * world_size == flat.total
    assert sum(numels) <= flat.total < sum(numels) + 2 * world_size
    assert flat.largest_slice <= min(flat.partition, flat.largest_parameter)
    assert flat.gradient_buffer >= min(flat.partition, sum(numels))


@pytest.mark.parametrize(("precision", "itemsize"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_stages_1_and_2_hold_whole_weights_and_partitions(strategy: str, precision: str, itemsize: int) -> None:
    partition = NUM_ELEMENTS // 2
    assert start(rewritten(strategy, precision=precision)) == {
        Owner.WEIGHTS: NUM_ELEMENTS * itemsize,
        Owner.MASTER_WEIGHTS: 4 * partition,
        Owner.OPTIMIZER_STATES: 2 * 4 * partition + 4,
    }


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_the_bucket_has_its_full_size_and_dies(strategy: str) -> None:
    """Plus the flat copy of a full one: three blocks and the head, 292 elements, which the embedding overflows."""
    assert most(rewritten(strategy), Owner.COMMUNICATION) == 2 * (BUCKET + 292)
    assert most(rewritten(strategy, overlap_comm=True), Owner.COMMUNICATION) == 2 * (2 * BUCKET + 292)
    assert most(rewritten(strategy, reduce_bucket_size=10**9), Owner.COMMUNICATION) == 2 * (10**9 + NUM_ELEMENTS)
    assert end(rewritten(strategy)) == sum(start(rewritten(strategy)).values())


def test_stage_1_keeps_gradients_until_the_end_and_stage_2_does_not() -> None:
    """Stage 2 holds the gradients of its partition (elements of parameters that reach into it) and one more."""
    buffer = 292 * 2  # the last rank's: the last block but one, the last, the norms and the head
    assert most(rewritten("zero1", reduce_bucket_size=10**6), Owner.GRADIENTS) == 2 * NUM_ELEMENTS
    assert most(rewritten("zero2", reduce_bucket_size=10**6), Owner.GRADIENTS) <= buffer
    assert most(rewritten("zero1", overlap_comm=True), Owner.GRADIENTS) == most(rewritten("zero2"), Owner.GRADIENTS)


def test_an_oversized_gradient_stays_until_the_next() -> None:
    """A bucket of 50 elements copies norms only. Of what it reduces, only a matrix that belongs to two ranks is two
    slices, and is copied to lie flat: 60 elements."""
    small = rewritten("zero2", reduce_bucket_size=50)
    assert end(small) == sum(start(small).values())
    assert most(small, Owner.COMMUNICATION) == 2 * (50 + 60)


def test_the_update_casts_gradients_to_fp32() -> None:
    """Flat bf16 gradients, then their fp32 copy, beside the norm's fp64 slice before them."""
    partition = NUM_ELEMENTS // 2
    assert most(rewritten("zero2"), Owner.TEMPORARIES) == (2 + 4) * partition
    assert most(rewritten("zero2", precision="fp32"), Owner.TEMPORARIES) == 8 * 100


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_first_step_makes_the_states(strategy: str) -> None:
    first, steady = rewritten(strategy, state="first"), rewritten(strategy)
    assert Owner.OPTIMIZER_STATES not in start(first)
    assert end(first) == end(steady)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_steps_end_as_they_began(strategy: str) -> None:
    for overrides in ({}, {"precision": "fp32"}, {"optimizer": "adamw_torch"}, {"offload": "optimizer"}):
        step = rewritten(strategy, **overrides)
        assert end(step) == sum(start(step).values())


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_offloading_moves_master_weights_and_states_to_the_host(strategy: str) -> None:
    here, moved = rewritten(strategy), rewritten(strategy, offload="optimizer")
    assert {Owner.MASTER_WEIGHTS, Owner.OPTIMIZER_STATES} <= set(start(here))
    assert not {Owner.MASTER_WEIGHTS, Owner.OPTIMIZER_STATES} & set(start(moved))
    assert moved.host_persistent_bytes >= 4 * 4 * NUM_ELEMENTS // 2
    assert peak(moved) < peak(here)
    directions = {copy.to_device for section in moved.sections for copy in section.copies}
    assert directions == {True, False}


def test_on_a_cpu_the_host_is_the_device() -> None:
    settings = {"offload": "optimizer", "offload_pin_memory": False}  # nothing is pinned where there is no GPU
    gpu, cpu = rewritten("zero2", **settings), rewritten("zero2", cpu=True, **settings)
    assert cpu.host_persistent_bytes == 0
    assert sum(start(cpu).values()) == sum(start(gpu).values()) + gpu.host_persistent_bytes


def test_offloading_everything_leaves_no_weights() -> None:
    assert Owner.WEIGHTS not in start(rewritten("zero3", offload="all"))


def test_stage_3_partitions_everything_but_what_is_small() -> None:
    """Three norms of 4 stay gathered; the gradients of the partition and the bucket are there for good."""
    partition = NUM_ELEMENTS // 2
    assert start(rewritten("zero3")) == {
        Owner.WEIGHTS: 2 * partition,
        Owner.GATHERED_WEIGHTS: 2 * 3 * 4,
        Owner.COMMUNICATION: 2 * BUCKET,
        Owner.GRADIENTS: 2 * partition,
        Owner.MASTER_WEIGHTS: 4 * partition,
        Owner.OPTIMIZER_STATES: 2 * 4 * partition + 4,
    }


def test_stage_3_gathers_everything_of_a_small_model() -> None:
    """Prefetching takes it all at once: a flat buffer and the copies of 380 elements."""
    assert most(rewritten("zero3"), Owner.GATHERED_WEIGHTS) == 2 * (2 * 380 + 12)


def test_stage_3_holds_little_when_told_to() -> None:
    """No prefetch and no reuse: one module's weights at a time, beside the norms."""
    settings = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    assert most(rewritten("zero3", **settings), Owner.GATHERED_WEIGHTS) == 2 * (100 + 12)


def test_sub_groups_are_updated_one_by_one() -> None:
    """Two ranks hold 196 elements; groups are closed at 60, so the flat gradients are smaller than all of them."""
    grouped = rewritten("zero3", sub_group_size=60)
    assert most(grouped, Owner.TEMPORARIES) < most(rewritten("zero3"), Owner.TEMPORARIES)
    assert sum(start(grouped).values()) == sum(start(rewritten("zero3")).values()) + 4 * 2  # two more step counts


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [
        ("zero1", {CollectiveKind.ALL_REDUCE, CollectiveKind.ALL_GATHER}),
        ("zero2", {CollectiveKind.ALL_REDUCE, CollectiveKind.ALL_GATHER}),
        ("zero3", {CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_GATHER}),
    ],
)
def test_messages(strategy: str, kinds: set[CollectiveKind]) -> None:
    """Every gradient is reduced once; one rank sends nothing."""
    step = rewritten(strategy)
    sent = [
        message
        for stage in step.stages
        if stage.phase is Phase.BACKWARD
        for layer in stage.order()
        for message in step.section_of(stage, layer).collectives
        if message.kind is not CollectiveKind.ALL_GATHER
    ]
    assert sum(message.num_bytes.at(POINT) for message in sent) == 2 * NUM_ELEMENTS
    assert {message.kind for section in step.sections for message in section.collectives} == kinds
    assert not any(section.collectives for section in rewritten(strategy, num_gpus=1).sections)


def test_frozen_weights_have_no_master_copy() -> None:
    step = strategies.rewrite(
        program(itemsize=2, frozen=True),
        scenario=plain(strategy="zero2", precision="bf16", reduce_bucket_size=BUCKET, method="lora"),
        cluster=ranks(2),
    )
    assert start(step)[Owner.WEIGHTS] == 2 * NUM_ELEMENTS
    assert start(step)[Owner.MASTER_WEIGHTS] == 4 * 3 * 4 // 2


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_accumulation_never_takes_less(strategy: str) -> None:
    step = rewritten(strategy, gradient_accumulation_steps=2)
    assert peak(step) >= peak(rewritten(strategy)) - 8


FETCH = FetchSettings(prefetch_elements=0, max_live_elements=100, max_reuse_elements=0, world_size=2)
USES = [ModuleUse(0, (0,)), ModuleUse(1, (1,)), ModuleUse(2, (1,)), ModuleUse(3, (0,))]


@pytest.mark.parametrize(
    ("settings", "recorded", "held"),
    [
        ({}, True, [10, 20, 20, 10]),
        ({}, False, [10, 20, 20, 10]),
        ({"max_reuse_elements": 50}, True, [10, 30, 30, 10]),
        ({"max_reuse_elements": 50}, False, [10, 20, 20, 10]),
        ({"prefetch_elements": 100}, True, [30, 30, 30, 10]),
        ({"prefetch_elements": 100}, False, [10, 20, 20, 10]),
        ({"prefetch_elements": 100, "max_live_elements": 10}, True, [10, 20, 20, 10]),
        ({"world_size": 3}, True, [12, 21, 21, 12]),
    ],
)
def test_replay_of_the_coordinator(settings: dict[str, int], recorded: bool, held: list[int]) -> None:
    """Weights of 10 and 20 elements, used forth and back."""
    values = {field: getattr(FETCH, field) for field in FETCH.__dataclass_fields__} | settings
    readings = replay(USES, [10, 20], FetchSettings(**values), recorded=recorded)
    assert [readings[place].modules[0].held for place in range(4)] == held


@pytest.mark.parametrize(
    ("settings", "peaks", "held"),
    [
        ({}, [30, 60, 30], [30, 60, 20]),
        ({"copies": 1}, [60, 60, 30], [30, 60, 20]),
        ({"from_host": True}, [45, 60, 30], [30, 60, 20]),
        ({"is_quantized": True, "itemsize": 2}, [15, 45, 30], [15, 45, 20]),
    ],
)
def test_weights_fetched_ahead_lie_in_a_flat_buffer_until_the_last_is_used(
    settings: dict[str, int], peaks: list[int], held: list[int]
) -> None:
    """Two modules prefetched together: buffer only, then buffer and copies, then copies."""
    uses = [ModuleUse(0, ()), ModuleUse(1, (0,)), ModuleUse(2, (1,))]
    ahead = {"prefetch_elements": 100, "max_live_elements": 100, "max_reuse_elements": 100, "world_size": 2}
    readings = replay(uses, [10, 20], FetchSettings(**(ahead | settings)), recorded=True)
    assert [readings[place].modules[0].held for place in range(3)] == held
    assert [readings[place].modules[0].peak for place in range(3)] == [*peaks[:2], readings[2].before]
    assert [bool(readings[place].fetched) for place in range(3)] == [True, False, False]


def test_weights_that_stay_count_as_distance() -> None:
    """A norm of 40 elements between two uses of one weight makes them too far apart to keep it."""
    near = replay([ModuleUse(0, (0,)), ModuleUse(1, (), 9), ModuleUse(2, (0,))], [10], REUSE, recorded=True)
    far = replay([ModuleUse(0, (0,)), ModuleUse(1, (), 40), ModuleUse(2, (0,))], [10], REUSE, recorded=True)
    assert (near[1].before, far[1].before) == (10, 0)


REUSE = FetchSettings(prefetch_elements=0, max_live_elements=100, max_reuse_elements=20, world_size=2)


def test_a_gradient_lets_its_weight_go() -> None:
    """Three modules of a backward pass: what is held falls with each gradient, and nothing is left behind the last."""
    stage = Stage(name="backward.layers", phase=Phase.BACKWARD, layers=(0,), stack="layers", reverse=True)
    gradients = tuple(
        Alloc(slot, Size.constant(8), Owner.GRADIENTS, parameter) for slot, parameter in enumerate((1, 0))
    )
    modules = (Module(()), Module((1,)), Module((0,)))
    reading = PlaceReading(5, (ModuleReading(7, 7, 7), ModuleReading(30, 20, 10), ModuleReading(10, 10, 0)), 0)
    found = list(segments(stage, Section(events=gradients), modules, reading))
    assert found == [Segment(20, 30, frozenset({1})), Segment(10, 10, frozenset({0})), Segment(0, 0)]


@pytest.mark.parametrize(
    ("changes", "held"),
    [((7, 25), 25), ((25, 7), 7), ((10, 10), 10), ((25, 0), 0)],
)
def test_a_level_changes_by_pieces(changes: tuple[int, ...], held: int) -> None:
    events = EventList("s")
    level = Level(events, itemsize=2, piece_elements=10, stream=Stream.GATHER)
    for elements in changes:
        level.set(elements)
    live = sum(event.size.at(POINT) * (1 if isinstance(event, Alloc) else -1) for event in events.events)
    assert (level.elements, live) == (held, 2 * held)


def test_a_level_keeps_the_pieces_that_stay() -> None:
    events = EventList("s")
    level = Level(events, itemsize=1, piece_elements=10, stream=Stream.GATHER)
    level.set(30)
    level.set(35, peak=50)
    assert [event.size.at(POINT) for event in events.events[3:]] == [5, 15, 15]


def streams(rewritten_program: StepProgram) -> dict[Owner, set[Stream]]:
    """The streams on which a step allocates, by owner."""
    found: dict[Owner, set[Stream]] = {}
    for part in rewritten_program.sections:
        for event in part.events:
            if isinstance(event, Alloc):
                found.setdefault(event.owner, set()).add(event.stream)
    return found


GATHERED, SENT, OWN = Owner.GATHERED_WEIGHTS, Owner.COMMUNICATION, Owner.GRADIENTS
COMPUTE, GATHER, REDUCE = Stream.COMPUTE, Stream.GATHER, Stream.REDUCE


# DeepSpeed 0.19.8: parameter_offload.py:195 and partitioned_param_coordinator.py:400, 606 (gathers and what arrives),
# stage3.py:339, 1669 (flat copies of a full bucket), stage_1_and_2.py:1594, 2240 (the same, and this rank's buffer,
# made in ``copy_grads_in_partition``), 3266 (buckets). Weights that stay are gathered again by the step, in stage3.py's
# ``_post_step``, on the stream that it runs on.
@pytest.mark.parametrize(
    ("strategy", "settings", "expected"),
    [
        ("zero3", {}, {GATHERED: {COMPUTE, GATHER}, SENT: {REDUCE}}),
        ("zero3", {"overlap_comm": False}, {GATHERED: {COMPUTE}, SENT: {COMPUTE}}),
        ("zero3", {"offload": "all"}, {GATHERED: {GATHER}, SENT: {REDUCE}}),
        ("zero2", {}, {SENT: {COMPUTE}, OWN: {COMPUTE}}),
        ("zero2", {"overlap_comm": True}, {SENT: {COMPUTE, REDUCE}, OWN: {COMPUTE, REDUCE}}),
        ("zero1", {}, {SENT: {COMPUTE}, OWN: {COMPUTE}}),
        ("zero1", {"overlap_comm": True}, {SENT: {COMPUTE, REDUCE}, OWN: {COMPUTE, REDUCE}}),
    ],
)
def test_what_is_gathered_and_reduced_lies_on_streams_of_its_own(
    strategy: str, settings: dict[str, Any], expected: dict[Owner, set[Stream]]
) -> None:
    found = streams(rewritten(strategy, **settings))
    assert {owner: found[owner] for owner in expected} == expected
    others = set(found) - {GATHERED, SENT, OWN, Owner.TEMPORARIES}
    assert all(found[owner] == {COMPUTE} for owner in others)


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_streams_change_nothing_of_what_stage_3_allocates(offload: str) -> None:
    apart, together = (peak(rewritten("zero3", offload=offload, overlap_comm=overlap)) for overlap in (False, True))
    assert apart == together


@pytest.mark.parametrize(
    ("settings", "owner", "less"),
    [
        ({"contiguous_gradients": False}, Owner.COMMUNICATION, True),
        ({"mics_shard_size": 2}, Owner.GRADIENTS, False),
        ({"zero_quantized_weights": True}, Owner.GATHERED_WEIGHTS, True),
        ({"zero_hpz_partition_size": 2}, Owner.WEIGHTS, False),
    ],
)
def test_settings_have_their_effect(settings: dict[str, Any], owner: Owner, less: bool) -> None:
    changed, default = (rewritten("zero3", num_gpus=4, **values) for values in (settings, {}))
    assert (most(changed, owner) < most(default, owner)) is less
    assert most(changed, owner) != most(default, owner)


def test_torchs_linear_layers_keep_what_is_gathered_until_their_backward() -> None:
    """Three matrices of 60 and the head's of 100, of 2 bytes, at the end of the forward pass; the embedding's not."""
    tight = {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0, "memory_efficient_linear": False}
    default = most(rewritten("zero3", **tight | {"memory_efficient_linear": True}), Owner.GATHERED_WEIGHTS)
    kept = most(rewritten("zero3", **tight), Owner.GATHERED_WEIGHTS)
    assert kept == default + 2 * (3 * 60 + 100)
    checkpointed = most(rewritten("zero3", checkpointing="full", **tight), Owner.GATHERED_WEIGHTS)
    assert checkpointed == default + 2 * 100


def test_a_lone_gradient_is_scattered_where_it_lies() -> None:
    """No gradient shares a bucket of 20 elements with another, so none is copied but by gloo; a matrix of 60 and
    the norms of 4 around it share one of 70."""
    assert most(rewritten("zero3", reduce_bucket_size=20), Owner.COMMUNICATION) == 2 * 20
    assert most(rewritten("zero3", reduce_bucket_size=70), Owner.COMMUNICATION) == 2 * (70 + 68)
    assert most(rewritten("zero3", reduce_bucket_size=20, cpu=True), Owner.COMMUNICATION) == 2 * (20 + 100)


@pytest.mark.parametrize(
    ("strategy", "settings", "reason"),
    [
        ("zero2", {"mics_shard_size": 2}, "use --strategy zero3"),
        ("zero3", {"mics_shard_size": 3}, "does not divide 4 GPUs"),
        ("zero3", {"zero_hpz_partition_size": 3}, "does not divide 4 GPUs"),
        ("zero3", {"zero_hpz_partition_size": 2}, None),
    ],
)
def test_groups_of_ranks_are_alike(strategy: str, settings: dict[str, int], reason: str | None) -> None:
    found = strategies.refusal(plain(strategy=strategy, **settings), profile(), ranks(4))
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("strategy", "targets", "keeps"),
    [("zero3", "q_proj", True), ("zero3", "all-linear", False), ("zero2", "q_proj", False)],
)
def test_stage_3_keeps_the_inputs_of_frozen_layers(strategy: str, targets: str, keeps: bool) -> None:
    settings = plain(strategy=strategy, method="lora", lora_targets=targets)
    key = strategies.trace_key(settings.training, settings.strategy, DeviceKind.CUDA)
    assert (key.keeps_linear_inputs, "inputs" in key.text) == (keeps, keeps)


def test_pinned_buffers_take_powers_of_two() -> None:
    """A rank's 196 elements: master weights and gradients of 784 bytes, the weights' way back of 392, a gradient of
    200; states are pageable."""
    pinned = rewritten("zero2", offload="optimizer").host_persistent_bytes
    pageable = rewritten("zero2", offload="optimizer", offload_pin_memory=False).host_persistent_bytes
    assert pinned - pageable == 2 * (1024 - 784) + (512 - 392) + (256 - 200)
