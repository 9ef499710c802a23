"""From logs to a program: which layer stands for which, what dies where, and what may not be left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchkit.errors import TraceError
from launchkit.program import Anchor, Free, Owner, ParameterGroup, Point, StepProgram
from launchkit.scenario import Checkpointing, Compute
from launchkit.simulate.expand import expand
from launchkit.trace import trace_model
from launchkit.trace.assemble import TracedModel, assemble, parameter, stand_ins, with_idle_layers_apart
from launchkit.trace.build import Stack, choose_layers
from launchkit.trace.recorder import AllocRecord, FreeRecord, Log, Place
from tests.trace.models import LLAMA, key

POINTS = (Point(2, 64), Point(3, 64), Point(2, 96), Point(4, 160))
FORWARD, BACKWARD = "forward.layers", "backward.layers"
EMPTY = TracedModel(
    stacks=(), groups={}, owners={}, parameter_names=(), group_of_layer={}, buffer_bytes=(), vocab_size=0
)


def stack(kinds: Sequence[str]) -> Stack:
    return Stack(path="layers", kinds=tuple(kinds), kept=choose_layers(kinds), block_class="Block")


@pytest.mark.parametrize(
    ("kinds", "kept", "stood_for"),
    [
        ("a", (0,), (0,)),
        ("aaa", (0, 1, 2), (0, 1, 2)),
        ("abab", (0, 1, 2, 3), (0, 1, 2, 3)),
        ("aaaaaaa", (0, 1, 2, 3), (0, 1, 1, 1, 1, 1, 3)),
    ],
)
def test_layers_alike_are_traced_four_times_at_most(
    kinds: str, kept: tuple[int, ...], stood_for: tuple[int, ...]
) -> None:
    assert choose_layers(kinds) == kept
    assert stand_ins(stack(kinds)) == stood_for


@given(kinds=st.text("sf", min_size=1, max_size=24))
def test_a_stand_in_is_of_the_same_kind_between_the_same_neighbours(kinds: str) -> None:
    cut = stack(kinds)
    last = len(kinds) - 1
    for layer, j in enumerate(stand_ins(cut)):
        assert kinds[cut.kept[j]] == kinds[layer]
        if len(set(kinds)) > 1 and 0 < layer < last:
            traced = cut.kept[j]
            assert kinds[traced - 1 : traced + 2] == kinds[layer - 1 : layer + 2]
    assert stand_ins(cut)[0] == 0
    assert stand_ins(cut)[-1] == len(cut.kept) - 1


@given(kinds=st.text("sf", min_size=5, max_size=24))
def test_a_stand_in_was_traced_between_neighbours_like_its_own(kinds: str) -> None:
    """Or what it says of them, such as which of their tensors it frees, is another kind's."""
    cut = stack(kinds)
    if len(set(kinds)) == 1:
        return
    for layer, j in enumerate(stand_ins(cut)):
        first = max(cut.kept[j] - 1, 0)
        traced = [kinds[i] for i in cut.kept[max(j - 1, 0) : j + 2]]
        assert traced == list(kinds[first : cut.kept[j] + 2]), layer


@given(kinds=st.text("sf", min_size=5, max_size=24))
def test_the_first_and_the_last_of_a_kind_stand_for_no_other(kinds: str) -> None:
    """What all layers of a kind share, such as their mask, ends there."""
    cut = stack(kinds)
    if len(set(kinds)) == 1:
        return
    substitutes = stand_ins(cut)
    for kind in set(kinds):
        for layer in (kinds.index(kind), kinds.rindex(kind)):
            assert cut.kept[substitutes[layer]] == layer
            assert substitutes.count(substitutes[layer]) == 1


def written(sizes_by_layer: Sequence[int], point: Point) -> Log:
    """A step whose layers keep a storage of so many bytes per token each, freed by their own backward."""
    log = Log(inputs=[])
    tokens = point.micro_batch * point.seq_len
    for layer, size in enumerate(sizes_by_layer):
        log.memory.append(AllocRecord(layer, size * tokens, Place(FORWARD, layer), "aten::mm", 8))
    log.memory += [FreeRecord(i, Place(BACKWARD, i)) for i in reversed(range(len(sizes_by_layer)))]
    return log


def assembled(sizes_by_layer: Sequence[int], *, kinds: str) -> StepProgram:
    block = ParameterGroup(name="Block", parameters=())
    model = TracedModel(
        stacks=(stack(kinds),),
        groups={"Block": block, "root": ParameterGroup(name="root", parameters=())},
        owners={},
        parameter_names=(),
        group_of_layer={"layers": ("Block",) * len(kinds)},
        buffer_bytes=(),
        vocab_size=0,
    )
    return assemble(model, [written(sizes_by_layer, point) for point in POINTS], POINTS)


def test_layers_that_were_cut_away_come_back() -> None:
    program = assembled([40, 8, 8, 24], kinds="aaaaaaa")
    births = [e.delta_bytes for e in expand(program, Point(1, 1)) if e.delta_bytes > 0]
    assert births == [40, 8, 8, 8, 8, 8, 24]
    assert sum(e.delta_bytes for e in expand(program, Point(5, 7))) == 0
    assert program.group_counts == {"root": 1, "Block": 7}


def test_middle_layers_that_differ_are_an_error() -> None:
    with pytest.raises(TraceError, match=r"layers 1 and 2 of forward\.layers are alike but differ in a step"):
        assembled([8, 8, 16, 8], kinds="aaaaaaa")
    assembled([8, 8, 16, 8], kinds="aaaa")  # nothing was cut, so nothing has to be alike


def test_a_step_that_differs_between_points_is_an_error() -> None:
    logs = [written([8] * (3 if point.seq_len > 100 else 2), point) for point in POINTS]
    with pytest.raises(
        TraceError, match=r"the step differs between batch sizes or lengths at .* of aten::mm in backward\.layers"
    ):
        assemble(EMPTY, logs, POINTS)


def test_deaths_with_no_birth_between_have_no_order() -> None:
    births = [AllocRecord(i, 64, Place(FORWARD, 0), "aten::mm", 8) for i in (0, 1)]
    deaths = [FreeRecord(i, Place(BACKWARD, 0)) for i in (0, 1)]
    told, swapped = Log(memory=[*births, *deaths]), Log(memory=[*births, *reversed(deaths)])
    assert assemble(EMPTY, [told, told, told, swapped], POINTS) == assemble(EMPTY, [told] * 4, POINTS)
    early = Log(memory=[births[0], deaths[0], births[1], deaths[1]])
    with pytest.raises(TraceError, match="the step differs"):
        assemble(EMPTY, [told, told, told, early], POINTS)


@pytest.mark.parametrize(
    ("name", "shape", "rank", "expected", "axis"),
    [
        ("q_proj.lora_A.default.weight", (8, 32), 8, (1, 32), 0),
        ("q_proj.lora_B.default.weight", (32, 8), 8, (32, 1), 1),
        ("q_proj.lora_B.default.weight", (8, 8), 8, (8, 1), 1),
        ("q_proj.base_layer.weight", (8, 32), 8, (8, 32), None),
        ("q_proj.weight", (8, 32), 0, (8, 32), None),
        ("mlp.experts.base_layer.lora_A.default.weight", (2048, 64), 8, (256, 64), 0),
        ("mlp.experts.base_layer.lora_B.default.weight", (1024, 2048), 8, (1024, 256), 1),
        ("embed_tokens.lora_embedding_B.default", (64, 8), 8, (64, 1), 1),
        ("q_proj.lora_magnitude_vector.default.weight", (32,), 8, (32,), None),
    ],
)
def test_the_rank_is_taken_out_of_an_adapter(
    name: str, shape: tuple[int, ...], rank: int, expected: tuple[int, ...], axis: int | None
) -> None:
    row = parameter(name, shape, 4, trainable=True, lora_rank=rank)
    assert (row.shape, row.lora_rank_axis) == (expected, axis)


@pytest.mark.filterwarnings("ignore")
def test_autocast_copies_of_the_weights_die_in_every_layer_when_the_forward_pass_ends() -> None:
    """With checkpointing no gradient needs them, so all die together, those of the layers that were cut away too."""
    program = trace_model(LLAMA, key(compute=Compute.AUTOCAST_BF16, checkpointing=Checkpointing.FULL))
    matrices = [p.numel() for p in program.groups["LlamaDecoderLayer"].parameters if len(p.shape) == 2]
    (loss,) = (stage for stage in program.stages if stage.phase == "loss")
    freed = [e for e in program.section_of(loss, 0).events if isinstance(e, Free)]
    copies = [e for e in freed if e.ref.stage == "forward.model.layers" and e.size.is_constant]
    layers = {e.ref.layer if e.ref.anchor is Anchor.FIRST else 6 - e.ref.layer for e in copies}
    assert layers == set(range(7))
    assert sum(e.size.at(Point(2, 64)) for e in copies) == 7 * 2 * sum(matrices)


@pytest.mark.filterwarnings("ignore")
def test_only_gradients_outlive_a_step() -> None:
    program = trace_model(LLAMA, key())
    totals: dict[Owner, int] = {}
    for event in expand(program, Point(3, 100)):
        if event.stage >= 0:
            totals[event.owner] = totals.get(event.owner, 0) + event.delta_bytes
    assert {owner: total for owner, total in totals.items() if total} == {Owner.GRADIENTS: 4 * program.num_parameters()}


@pytest.mark.parametrize(
    ("with_gradients", "counts"),
    [
        ((0, 1, 2, 3), {"Block": 7}),
        ((0, 1, 2), {"Block": 6, "Block.idle": 1}),
        ((1, 2, 3), {"Block": 6, "Block.idle": 1}),
        ((), {"Block": 7}),
    ],
)
def test_layers_that_no_loss_depends_on_are_told_apart(with_gradients: tuple[int, ...], counts: dict[str, int]) -> None:
    weight = parameter("weight", (2, 2), 4, trainable=True, lora_rank=0)
    model = TracedModel(
        stacks=(stack("aaaaaaa"),),
        groups={"Block": ParameterGroup(name="Block", parameters=(weight,))},
        owners={f"layers.{j}.weight": ("Block", 0) for j in range(4)},
        parameter_names=tuple(f"layers.{j}.weight" for j in range(4)),
        group_of_layer={"layers": ("Block",) * 7},
        buffer_bytes=(),
        vocab_size=0,
    )
    log = Log(inputs=[])
    log.gradients.update({number: f"layers.{j}.weight" for number, j in enumerate(with_gradients)})
    found = with_idle_layers_apart(model, log)
    assert Counter(found.group_of_layer["layers"]) == counts
    assert {found.owners[f"layers.{j}.weight"][0] for j in with_gradients} <= {"Block"}
