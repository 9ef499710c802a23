"""A rank's step as it really runs: split weights, the ring, Ulysses."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

import pytest

from launchkit.catalog.codec import ProgramFile, encode
from launchkit.errors import TraceError
from launchkit.program import CollectiveKind, Group, Owner, Phase, Point, StepProgram
from launchkit.scenario import Compute, DeviceKind
from launchkit.trace import trace_model
from tests.builders import profile
from tests.trace.models import GPT2, LLAMA, LORA, MIXTRAL, TIED, key

pytestmark = pytest.mark.filterwarnings("ignore")
long = pytest.mark.skipif(
    "LAUNCHKIT_LONG_TESTS" not in os.environ, reason="several seconds each; set LAUNCHKIT_LONG_TESTS"
)
POINT = Point(2, 128)


@cache
def llama(**degree: int) -> StepProgram:
    """The model's step in bf16 on a GPU, split by one degree or not at all."""
    return trace_model(LLAMA, key(device=DeviceKind.CUDA, compute=Compute.BF16, **degree))


def parameters(program: StepProgram) -> dict[str, tuple[int, ...]]:
    return {p.name.rpartition(".")[0] or p.name: p.shape for g in program.groups.values() for p in g.parameters}


def messages(program: StepProgram, phase: Phase) -> dict[str, list[tuple[CollectiveKind, int]]]:
    """What a middle layer of each stage of a phase sends."""
    return {
        stage.name: [
            (c.kind, c.num_bytes.at(POINT)) for c in program.section_of(stage, len(stage.layers) // 2).collectives
        ]
        for stage in program.stages
        if stage.phase is phase
    }


def activation_bytes(program: StepProgram) -> int:
    layer = next(stage for stage in program.stages if stage.stack and stage.phase is Phase.FORWARD)
    events = program.section_of(layer, 3).events
    return sum(e.size.at(POINT) for e in events if getattr(e, "owner", None) is Owner.ACTIVATIONS)


def test_a_tensor_parallel_rank_holds_its_part_of_each_matrix() -> None:
    program = llama(tp=2)
    shapes = parameters(program)
    assert shapes["self_attn.q_proj"] == (16, 32)
    assert shapes["self_attn.o_proj"] == (32, 16)
    assert shapes["mlp.down_proj"] == (32, 24)
    assert shapes["model.norm"] == (32,)
    hidden = 2 * 128 * 32 * 2
    layer = [(CollectiveKind.ALL_REDUCE, hidden)] * 2  # behind the attention, behind the MLP
    assert messages(program, Phase.FORWARD) == {
        "forward.0": [(CollectiveKind.ALL_REDUCE, hidden)],  # the vocabulary is shared out
        "forward.model.layers": layer,
    }
    assert messages(program, Phase.LOSS)["forward.1"] == [(CollectiveKind.ALL_GATHER, 2 * 128 * 96 * 2)]
    assert {c.group for s in program.sections for c in s.collectives} == {Group.COPY}


def test_an_embedding_of_its_own_has_the_gradient_of_all_of_it() -> None:
    program = llama(tp=2)
    wide = {p.name: p.gradient_numel for p in program.groups["root"].parameters if p.gradient_numel}
    assert wide == {"model.embed_tokens.weight": 96 * 32}
    assert ProgramFile(encode(profile(), {"x": program}), where="a test").program("x") == program


@long
def test_a_tied_head_is_split_with_its_embedding() -> None:
    root = trace_model(TIED, key(tp=2)).groups["root"].parameters
    assert [(p.name, p.shape, p.gradient_numel) for p in root if "norm" not in p.name] == [
        ("model.embed_tokens.weight", (48, 32), 0)
    ]


@cache
def adapted() -> StepProgram:
    """The model's step with adapters of rank 8 on all linear layers, on two ranks."""
    return trace_model(LLAMA, key(device=DeviceKind.CUDA, compute=Compute.BF16, tp=2, **LORA))


def test_adapters_are_split_as_their_matrices_are() -> None:
    """By columns the B matrix, by rows the A matrix; the other is whole on every rank. Shapes are those of rank 1."""
    shapes = {p.name: p.shape for g in adapted().groups.values() for p in g.parameters if p.trainable}
    assert {name.removesuffix(".default.weight"): shape for name, shape in shapes.items()} == {
        "self_attn.q_proj.lora_A": (1, 32),
        "self_attn.q_proj.lora_B": (16, 1),
        "self_attn.k_proj.lora_A": (1, 32),
        "self_attn.k_proj.lora_B": (8, 1),
        "self_attn.v_proj.lora_A": (1, 32),
        "self_attn.v_proj.lora_B": (8, 1),
        "self_attn.o_proj.lora_A": (1, 16),
        "self_attn.o_proj.lora_B": (32, 1),
        "mlp.gate_proj.lora_A": (1, 32),
        "mlp.gate_proj.lora_B": (24, 1),
        "mlp.up_proj.lora_A": (1, 32),
        "mlp.up_proj.lora_B": (24, 1),
        "mlp.down_proj.lora_A": (1, 24),
        "mlp.down_proj.lora_B": (32, 1),
    }


def test_adapters_send_messages_of_their_own() -> None:
    """What comes out of an A matrix split by rows is summed over the ranks, and so is the gradient of what goes into a
    B matrix split by columns: both as wide as the adapter's rank, in fp32."""
    point = Point(2, 128, 8)
    (forth,) = (s for s in adapted().stages if s.phase is Phase.FORWARD and s.stack)
    sent = [c.num_bytes.at(point) for c in adapted().section_of(forth, 3).collectives]
    hidden, narrow = 2 * 128 * 32 * 2, 2 * 128 * 8 * 4
    assert sent == [hidden, narrow, hidden, narrow]
    (back,) = (s for s in adapted().stages if s.phase is Phase.BACKWARD and s.stack)
    messages = [c.num_bytes.at(point) for c in adapted().section_of(back, 3).collectives]
    assert sorted(messages) == sorted([hidden, narrow] * 5)  # queries, keys, values, gate, up


@pytest.mark.parametrize(
    ("config", "wanted", "message"),
    [
        (
            LLAMA,
            {"lora_targets": "lm_head"},
            "transformers splits lm_head as colwise_gather_output; pass --lora-targets",
        ),
        (LLAMA, {"modules_to_save": "lm_head"}, "PEFT cannot copy lm_head, whose weight is split, to train it whole"),
        (MIXTRAL, {}, "adapters on fused experts that are split, which --lora-targets all-linear includes; pass"),
    ],
)
def test_what_peft_cannot_split_is_refused(config: dict[str, Any], wanted: dict[str, str], message: str) -> None:
    with pytest.raises(TraceError, match=re.escape(message)) as caught:
        trace_model(config, key(tp=2, **(LORA | wanted)))
    assert "\n" not in str(caught.value)


def test_a_model_without_a_plan_is_not_split() -> None:
    with pytest.raises(TraceError, match="has no tensor-parallel plan for GPT2LMHeadModel; use --strategy fsdp2"):
        trace_model(GPT2, key(tp=2))


@long
def test_an_odd_vocabulary_is_split_unevenly() -> None:
    """The first rank has the larger part."""
    assert parameters(trace_model(LLAMA | {"vocab_size": 95}, key(tp=2)))["model.embed_tokens"] == (48, 32)


def test_a_ring_sends_keys_and_values_round() -> None:
    program = llama(cp=2)
    pair = 2 * 2 * (128 // 2) * 2 * 8 * 2  # keys and values: batch, local tokens, heads, head size, in 16 bits
    everybodys = (CollectiveKind.ALL_GATHER, 2 * pair)
    assert messages(program, Phase.FORWARD)["forward.model.layers"] == [everybodys]
    gradients = (CollectiveKind.ALL_TO_ALL, 2 * pair)  # in fp32
    assert messages(program, Phase.BACKWARD)["backward.model.layers"] == [everybodys, gradients, gradients]
    assert parameters(program)["self_attn.q_proj"] == (32, 32)


@pytest.mark.parametrize("degree", [{"tp": 2}, {"cp": 2}, {"sp": 2}])
def test_a_rank_of_several_keeps_fewer_activations(degree: dict[str, int]) -> None:
    """Also under tensor parallelism, where DTensor makes tensors of global size to find shapes: they are no memory."""
    if "sp" in degree:
        pytest.importorskip("deepspeed")
    assert activation_bytes(llama(**degree)) < 0.75 * activation_bytes(llama())


def test_ulysses_swaps_sequences_for_heads() -> None:
    pytest.importorskip("deepspeed")
    program = llama(sp=2)
    tokens = 2 * (128 // 2)
    queries, keys = tokens * 4 * 8 * 2, tokens * 2 * 8 * 2
    there = [(CollectiveKind.ALL_TO_ALL, size) for size in (queries, keys, keys, queries)]
    assert messages(program, Phase.FORWARD)["forward.model.layers"] == there


def test_the_text_of_an_unsplit_key_stays() -> None:
    assert key().text == key(tp=1, cp=1, sp=1).text
    assert key(tp=2).text == f"{key().text}/tp2"
