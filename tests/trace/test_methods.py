"""Adapters go where PEFT puts them, and what matches nothing says what would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launchkit.errors import TraceError
from launchkit.program import Point, StepProgram
from launchkit.scenario import Attention, Compute, DeviceKind, Method
from launchkit.simulate.memory import read_memory
from launchkit.trace import trace_model
from launchkit.trace.build import build_on_meta, load_config, training_class
from launchkit.trace.methods import lora_targets
from tests.trace.models import GPT2, LLAMA, MIXTRAL, T5, first_section, key

pytestmark = pytest.mark.filterwarnings("ignore")


def targets(config: dict[str, Any], text: str) -> tuple[str | list[str], list[str]]:
    settings = load_config(config)
    model_class, _ = training_class(settings)
    return lora_targets(build_on_meta(model_class, settings, attention=Attention.SDPA, dtype=torch.float32), text)


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        (LLAMA, "all-linear", ("all-linear", [])),
        (LLAMA, "attention", (["k_proj", "o_proj", "q_proj", "v_proj"], [])),
        (LLAMA, "q_proj, v_proj", (["q_proj", "v_proj"], [])),
        (LLAMA, "down_proj", (["down_proj"], [])),
        (GPT2, "c_attn", (["c_attn"], [])),
        (T5, "attention", (["k", "o", "q", "v"], [])),
        (MIXTRAL, "experts.down_proj", ([], ["experts.down_proj"])),
        (MIXTRAL, "q_proj,experts.gate_up_proj", (["q_proj"], ["experts.gate_up_proj"])),
    ],
)
def test_targets_are_found(config: dict[str, Any], text: str, expected: tuple[str | list[str], list[str]]) -> None:
    assert targets(config, text) == expected


@pytest.mark.parametrize("text", ["qproj", "q_proj,nope", ",", "embed_tokens", "experts.down_proj"])
def test_unknown_names_list_the_choices(text: str) -> None:
    with pytest.raises(TraceError, match=r"matches no linear layer; choose among all-linear, attention, .*q_proj"):
        targets(LLAMA, text)


def program(**overrides: Any) -> StepProgram:
    return trace_model(LLAMA, key(**({"method": Method.LORA, "lora_targets": "all-linear"} | overrides)))


def test_adapters_grow_with_the_rank_and_nothing_else_is_trained() -> None:
    """Formula: r × (in + out) of each of the seven matrices of a block, in seven blocks."""
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    per_rank = 7 * sum(rows + columns for rows, columns in sizes)
    traced = program()
    assert traced.num_parameters(8, trainable=True) == 8 * per_rank
    assert traced.num_parameters(64, trainable=True) == 64 * per_rank
    trained = {p.name for group in traced.groups.values() for p in group.parameters if p.trainable}
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize(("text", "adapted"), [("attention", 4), ("q_proj,v_proj", 2)])
def test_only_the_targets_are_adapted(text: str, adapted: int) -> None:
    parameters = program(lora_targets=text).groups["LlamaDecoderLayer"].parameters
    assert sum(p.trainable for p in parameters) == 2 * adapted


@pytest.mark.parametrize(("cast_adapters", "itemsize"), [(False, 4), (True, 2)])
def test_adapters_of_a_16_bit_model_are_fp32_unless_an_engine_casts_them(cast_adapters: bool, itemsize: int) -> None:
    parameters = program(compute=Compute.BF16, cast_adapters=cast_adapters).groups["LlamaDecoderLayer"].parameters
    assert {p.itemsize for p in parameters if p.trainable} == {itemsize}
    assert {p.itemsize for p in parameters if not p.trainable} == {2}


def peak_bytes(traced: StepProgram) -> int:
    return read_memory(traced, Point(4, 256, 16)).allocated_peak_bytes


def test_dropout_keeps_a_mask_and_a_dropped_copy_of_each_adapters_input() -> None:
    """On CUDA the mask has a byte per element, the copy is fp32 like the input; both live to the backward pass.

    Without dropout projections of one input keep that one: four inputs of a block, instead of seven copies. The layer
    that the peak is in has let go of some.
    """
    plain, dropped = (
        program(device=DeviceKind.CUDA, compute=Compute.FP32, adapter_dropout=drops) for drops in (False, True)
    )
    copies, inputs = 6 * 32 + 48, 3 * 32 + 48  # elements per token and block
    grown = peak_bytes(dropped) - peak_bytes(plain)
    assert 6 <= grown / (4 * 256 * (copies * (1 + 4) - inputs * 4)) <= 7


def test_dora_trains_a_magnitude_per_output() -> None:
    outputs = 7 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    extra = program(dora=True).num_parameters(8, trainable=True) - program().num_parameters(8, trainable=True)
    assert extra == outputs


def test_modules_to_save_are_trained_whole() -> None:
    saved = program(modules_to_save="lm_head")
    head = next(p for group in saved.groups.values() for p in group.parameters if p.trainable and "lora_" not in p.name)
    assert "lm_head" in head.name and head.numel() == 32 * LLAMA["vocab_size"]


def test_unknown_modules_to_save_are_refused() -> None:
    with pytest.raises(TraceError, match=r"--lora-modules-to-save nope names no module of the model; try .*lm_head"):
        program(modules_to_save="nope")


def test_the_first_layer_stands_apart_where_the_gradient_ends_inside_it() -> None:
    """Nothing below the first adapter has a backward: of the first block only the adapted product and what follows."""
    traced = program(lora_targets="down_proj")
    first, second, third = (first_section(traced, "backward.model.layers", layer=layer) for layer in range(3))
    assert len(first.events) < len(second.events)
    assert second.events != third.events, "the second frees what the others share"


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_dora_trains_a_magnitude_for_each_row(method: Method) -> None:
    compute = Compute.BF16_AUTOCAST if method is Method.QLORA else Compute.FP32
    parameters = program(method=method, compute=compute, dora=True).groups["LlamaDecoderLayer"].parameters
    magnitudes = {p.name: p.shape for p in parameters if "magnitude" in p.name}
    assert len(magnitudes) == 7
    assert magnitudes["mlp.down_proj.lora_magnitude_vector.default.weight"] == (32,)


def test_modules_saved_whole_are_trained_beside_their_frozen_selves() -> None:
    root = {p.name: p.trainable for p in program(modules_to_save="lm_head").groups["root"].parameters}
    assert root["lm_head.modules_to_save.default.weight"]
    assert not root["lm_head.original_module.weight"]
    with pytest.raises(TraceError, match="--lora-modules-to-save head names no module of the model; try embed_tokens"):
        program(modules_to_save="head")


def test_fused_experts_take_adapters_of_their_own() -> None:
    traced = trace_model(MIXTRAL, key(method=Method.LORA, lora_targets="experts.gate_up_proj,experts.down_proj"))
    trained = [p for group in traced.groups.values() for p in group.parameters if p.trainable]
    assert len(trained) == 4
    assert all(".experts." in p.name for p in trained)


PHIMOE = {
    "model_type": "phimoe",
    "architectures": ["PhimoeForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
MAMBA = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": 96, "hidden_size": 16} | {
    "state_size": 4,
    "num_hidden_layers": 2,
    "time_step_rank": 4,
}


@pytest.mark.parametrize(
    ("config", "attention", "refusal"),
    [
        (
            PHIMOE,
            Attention.SDPA,
            r"PEFT's adapters do not run on router \(PhimoeTopKRouter\), one of --lora-targets all-linear; "
            r"pass --lora-targets attention$",
        ),
        (
            MAMBA,
            Attention.EAGER,
            r"PEFT refuses --lora-targets all-linear: Module '\w+' is incompatible with Mamba-based models .*; "
            r"pass --lora-targets dt_proj,in_proj,x_proj$",
        ),
    ],
    ids=["a router", "a state-space model"],
)
def test_layers_that_peft_cannot_adapt_are_named_with_those_that_it_can(
    config: dict[str, Any], attention: Attention, refusal: str
) -> None:
    with pytest.raises(TraceError, match=refusal):
        trace_model(config, key(method=Method.LORA, lora_targets="all-linear", attention=attention))
