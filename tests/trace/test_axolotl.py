"""Axolotl's formats, masks and inputs as its own runs have them (``bench/axolotl.py`` compares the peaks)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from launchkit.planner.evaluate import program_key
from launchkit.program import Point
from launchkit.scenario import Attention, Compute, DeviceKind, Method, Precision, Trainer, Widened
from launchkit.simulate.memory import read_memory
from launchkit.trace import trace_model
from launchkit.trace.axolotl import convert_embeddings, widen
from tests.builders import profile, scenario
from tests.trace.models import LLAMA, key

pytestmark = pytest.mark.filterwarnings("ignore")

POINT = Point(2, 64, 0)


def model() -> nn.Module:
    names = ("embed_tokens", "lm_head", "q_norm", "gate", "gate_proj", "down_proj")
    return nn.ModuleDict({name: nn.Linear(2, 2, dtype=torch.bfloat16) for name in names}).requires_grad_(False)


def wide(module: nn.Module) -> set[str]:
    return {name.partition(".")[0] for name, p in module.named_parameters() if p.dtype is torch.float32}


def test_what_is_held_in_fp32_goes_by_names() -> None:
    whole = nn.ModuleDict({"model": model()})
    widen(whole, Widened.EMBEDDINGS)
    assert wide(whole["model"]) == {"embed_tokens", "lm_head", "q_norm", "gate"}
    convert_embeddings(whole, torch.bfloat16)
    assert wide(whole["model"]) == {"gate"}
    routed = nn.ModuleDict({"model": model()})
    widen(routed, Widened.GATES)
    assert wide(routed["model"]) == {"gate"}


@pytest.mark.parametrize(
    ("fields", "num_active", "widened"),
    [
        ({}, 0, Widened.EMBEDDINGS),
        ({"attention": Attention.EAGER}, 0, Widened.EMBEDDINGS),
        ({"attention": Attention.FLASH_ATTENTION_2}, 0, Widened.NOTHING),
        ({"attention": Attention.FLASH_ATTENTION_2}, 10**9, Widened.GATES),
        ({"method": Method.LORA}, 0, Widened.NOTHING),
        ({"method": Method.QLORA}, 0, Widened.GATES),
        ({"precision": Precision.FP32}, 0, Widened.NOTHING),
        ({"strategy": "zero2"}, 0, Widened.NOTHING),
        ({"strategy": "fsdp2"}, 0, Widened.NOTHING),
        ({"trainer": Trainer.HF}, 0, Widened.NOTHING),
    ],
)
def test_when_it_is(fields: dict[str, object], num_active: int, widened: Widened) -> None:
    usual = {"strategy": "ddp", "precision": Precision.BF16_PARAMS, "trainer": Trainer.AXOLOTL}
    asked = scenario(**(usual | fields))
    assert program_key(asked, profile(num_active_parameters=num_active), DeviceKind.CUDA).widened is widened


def test_adapters_make_embedded_tokens_require_gradients() -> None:
    def asks(**fields: object) -> bool:
        return program_key(scenario(strategy="single", **fields), profile(), DeviceKind.CUDA).input_grads

    assert asks(trainer=Trainer.AXOLOTL, method=Method.LORA)
    assert not asks(trainer=Trainer.AXOLOTL) and not asks(trainer=Trainer.HF, method=Method.LORA)


@pytest.mark.parametrize(
    ("fields", "device", "window", "packed"),
    [
        ({}, DeviceKind.CPU, 0, True),
        ({}, DeviceKind.CUDA, 0, False),  # boundaries in place of a mask
        ({}, DeviceKind.CUDA, 1024, True),
        ({"precision": Precision.FP32}, DeviceKind.CUDA, 0, True),
        ({"attention": Attention.EAGER}, DeviceKind.CUDA, 0, True),
        ({"attention": Attention.FLASH_ATTENTION_2}, DeviceKind.CUDA, 0, False),
    ],
)
def test_a_mask_keeps_packed_sequences_apart(
    fields: dict[str, object], device: DeviceKind, window: int, packed: bool
) -> None:
    usual = {"strategy": "single", "precision": Precision.BF16_PARAMS, "trainer": Trainer.AXOLOTL, "packing": True}
    asked = scenario(**(usual | fields))
    assert program_key(asked, profile(sliding_window=window), device).packed is packed


def test_flash_attention_holds_a_padded_output_beside_its_own() -> None:
    """In each layer: copies without padding take the place of queries, keys and values, the output is there twice."""
    usual = replace(
        key(),
        device=DeviceKind.CUDA,
        compute=Compute.BF16,
        attention=Attention.FLASH_ATTENTION_2,
        single_sequence=False,
    ).canonical
    padded = replace(usual, padded=True, attention=Attention.FLASH_ATTENTION_2).canonical
    assert usual.attention is Attention.SDPA and padded.attention is Attention.FLASH_ATTENTION_2
    peaks = [read_memory(trace_model(LLAMA, each), POINT).allocated_peak_bytes for each in (usual, padded)]
    output = 2 * POINT.micro_batch * POINT.seq_len * LLAMA["hidden_size"]
    indices = 8 * POINT.micro_batch * POINT.seq_len
    layers = LLAMA["num_hidden_layers"]
    assert layers * output < peaks[1] - peaks[0] < layers * (output + 2 * indices) + 4 * output


def test_the_usual_trainer_stands_in() -> None:
    axolotl = replace(key(), padded=True, widened=Widened.EMBEDDINGS, input_grads=True, packed=True)
    assert axolotl.of_usual_trainer == key().canonical
    flash = replace(key(), padded=True, attention=Attention.FLASH_ATTENTION_2)
    assert flash.of_usual_trainer.attention is Attention.SDPA
