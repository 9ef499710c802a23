"""torchao's layers in a trace: which are converted, what they multiply and hold, and what is asked of a machine."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from functools import cache
from typing import Any
from unittest import mock

import pytest

from launchkit.errors import MissingExtraError, TraceError
from launchkit.program import Owner, Point, Section, StepProgram
from launchkit.scenario import Compute, DeviceKind
from launchkit.trace import trace_model
from tests.trace.models import GPT2, LLAMA, allocations, first_section, key, varied

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

POINT = Point(1, 64, 0)
SHALLOW = varied(LLAMA, num_hidden_layers=3)
NUM_LINEARS = 7  # of a block: four of the attention, three of the MLP


@cache
def traced(**overrides: Any) -> StepProgram:
    settings = {"device": DeviceKind.CUDA, "compute": Compute.AUTOCAST_FP8, "single_sequence": True}
    return trace_model(SHALLOW, key(**settings | overrides))


def num_products(section: Section) -> int:
    return sum(kernel.count for kernel in section.kernels if kernel.float8)


@needs_torchao
@pytest.mark.parametrize(
    ("stage", "layer", "expected"),
    [
        ("forward.0", 0, 0),
        ("forward.model.layers", 0, NUM_LINEARS - 1),  # the first linear layer stays
        ("forward.model.layers", 1, NUM_LINEARS),
        ("forward.1", 0, 0),  # and so does the last, the head
        ("backward.model.layers", 1, 2 * NUM_LINEARS),
        ("backward.1", 0, 0),
    ],
)
def test_all_linear_layers_but_the_first_and_the_last_multiply_in_8_bits(stage: str, layer: int, expected: int) -> None:
    assert num_products(first_section(traced(), stage, layer=layer)) == expected


@needs_torchao
def test_a_layer_with_a_side_that_16_does_not_divide_stays() -> None:
    config = varied(SHALLOW, intermediate_size=40)
    program = trace_model(config, key(compute=Compute.AUTOCAST_FP8, single_sequence=True))
    assert num_products(first_section(program, "forward.model.layers", layer=1)) == NUM_LINEARS - 3


@needs_torchao
def test_an_8_bit_product_counts_as_many_flops_as_one_of_16_bits() -> None:
    whole = [
        sum(k.count * k.flops.at(POINT) for k in first_section(program, "forward.model.layers", layer=1).kernels)
        for program in (traced(), traced(compute=Compute.AUTOCAST_BF16))
    ]
    assert whole[0] == whole[1]


@needs_torchao
def test_activations_are_kept_in_16_bits_and_weights_as_they_are() -> None:
    """torchao saves the factors before the cast; autocast's bf16 copies of weights are what fp8 does without."""
    kept_sizes = []
    for program in (traced(), traced(compute=Compute.AUTOCAST_BF16)):
        section = first_section(program, "forward.model.layers", layer=1)
        kept = Counter(a.size for a in allocations(section) if a.owner is Owner.ACTIVATIONS)
        kept_sizes.append(Counter({size.at(POINT): n for size, n in kept.items() if not size.is_constant}))
    assert kept_sizes[0] == kept_sizes[1]


@needs_torchao
def test_padding_clones_both_factors_of_every_product() -> None:
    sections = [first_section(traced(pads_float8=pads), "forward.model.layers", layer=1) for pads in (True, False)]
    padded, plain = (len(allocations(section)) for section in sections)
    assert padded == plain + 2 * NUM_LINEARS


@needs_torchao
def test_gathered_weights_arrive_in_8_bits_and_are_not_cast_again() -> None:
    gathered = traced(compute=Compute.FP8_AUTOCAST, gathers_float8=True)
    first, inner = (group for name, group in gathered.groups.items() if name != "root")
    assert [p.itemsize for p in first.parameters][:2] == [2, 1]
    assert [p.itemsize for p in inner.parameters if p.name.endswith("proj.weight")] == [1] * NUM_LINEARS
    assert {p.itemsize for p in gathered.groups["root"].parameters} == {2}
    requests = [
        len(allocations(first_section(program, "forward.model.layers", layer=1))) for program in (gathered, traced())
    ]
    assert requests[0] < requests[1]


@needs_torchao
def test_gradients_of_gathered_weights_are_16_bit() -> None:
    program = traced(compute=Compute.FP8_AUTOCAST, gathers_float8=True)
    section = first_section(program, "backward.model.layers", layer=1)
    parameters = program.groups[section.group].parameters
    sizes = {a.parameter: a.size.at(POINT) for a in allocations(section) if a.owner is Owner.GRADIENTS}
    assert sizes == {index: 2 * p.numel(0) for index, p in enumerate(parameters)}


@needs_torchao
def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(TraceError, match=r"fp8 changes nothing in GPT2LMHeadModel.*use --precision bf16"):
        trace_model(varied(GPT2, n_layer=2), key(compute=Compute.AUTOCAST_FP8))


def test_without_torchao_the_extra_is_named() -> None:
    with (
        mock.patch.dict(sys.modules, {"torchao.float8": None}),
        pytest.raises(
            MissingExtraError, match=r"torchao, which is not installed; pip install 'launchkit-planner\[fp8\]'"
        ),
    ):
        trace_model(LLAMA, key(compute=Compute.AUTOCAST_FP8))
