"""A model is built whole, cut to a few layers, and stays the same model: its heads, ties and kinds of layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.accuracy.architectures import ARCHITECTURES
from launchkit.errors import LaunchkitError, ModelConfigError, TraceError
from launchkit.program import Parameter
from launchkit.scenario import Attention
from launchkit.trace import profile_model, trace_model
from launchkit.trace.build import (
    build_on_meta,
    choose_layers,
    cut,
    find_stacks,
    layer_kinds,
    load_config,
    to_fake,
    training_class,
)
from tests.trace.models import GPT2, LLAMA, MIXTRAL, T5, TIED, gemma3, key, varied

pytestmark = pytest.mark.filterwarnings("ignore")


def whole(config: dict[str, Any]) -> nn.Module:
    settings = load_config(config)
    model_class, _ = training_class(settings)
    return build_on_meta(model_class, settings, attention=Attention.SDPA, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "stacks"),
    [
        (LLAMA, {"model.layers": 7}),
        (GPT2, {"transformer.h": 7}),
        (MIXTRAL, {"model.layers": 7}),  # the lists of experts are part of a block
        (T5, {"encoder.block": 6, "decoder.block": 6}),
        (varied(LLAMA, num_hidden_layers=1), {}),
    ],
    ids=["llama", "gpt2", "mixtral", "t5", "one layer"],
)
def test_stacks_are_found(config: dict[str, Any], stacks: dict[str, int]) -> None:
    assert {path: len(blocks) for path, blocks in find_stacks(whole(config)).items()} == stacks


def test_a_list_of_different_modules_is_no_stack() -> None:
    model = nn.Module()
    model.mixed = nn.ModuleList([nn.Linear(1, 1), nn.Identity()])
    model.alike = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    assert list(find_stacks(model)) == ["alike"]


def test_cutting_keeps_what_lies_outside_of_the_stacks() -> None:
    model = whole(LLAMA)
    outside = {name for name, _ in model.named_parameters() if ".layers." not in name}
    (stack,) = cut(model, model.config)
    assert (stack.path, stack.kept, len(stack.kinds)) == ("model.layers", (0, 1, 2, 3), 7)
    assert len(model.get_submodule("model.layers")) == 4
    assert {name for name, _ in model.named_parameters() if ".layers." not in name} == outside


def test_kinds_come_from_the_layer_types_and_from_the_shapes() -> None:
    model = whole(gemma3(*"ssfs"))
    kinds = layer_kinds(model.config, find_stacks(model)["model.layers"])
    assert kinds[0] == kinds[1] == kinds[3] != kinds[2]
    uneven = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 4), nn.Linear(2, 2)])
    kinds = layer_kinds(load_config(varied(LLAMA, num_hidden_layers=3)), uneven)
    assert kinds[0] == kinds[2] != kinds[1]


def test_a_setting_that_only_numbers_layers_makes_no_kinds() -> None:
    stack = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(6))
    for layer in (0, 1, 3, 4):
        stack[layer].layer_idx = layer  # as only the linear attention of a hybrid has it
    stack[5].window = 8
    kinds = layer_kinds(load_config(varied(LLAMA, num_hidden_layers=3)), stack)
    assert [kinds[i] == kinds[0] for i in range(6)] == [True, True, True, True, True, False]


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [
        ("a" * 9, (0, 1, 2, 3)),
        ("aaab" * 8, (0, 1, 2, 3, 4, 6, 7, 8, 30, 31)),  # 5 and 29 have neighbours that others stand in for
        ("ab" * 4, (0, 1, 2, 3, 4, 5, 6, 7)),
        ("abc", (0, 1, 2)),
    ],
)
def test_every_case_is_traced_between_the_neighbours_it_has(kinds: str, kept: tuple[int, ...]) -> None:
    assert choose_layers(kinds) == kept


def test_a_head_that_the_file_has_apart_is_one_whatever_the_class_ties() -> None:
    apart = varied(T5, tie_word_embeddings=False)
    model, tied = whole(apart), whole(T5)
    assert model.lm_head.weight is not model.shared.weight is model.encoder.embed_tokens.weight
    assert tied.lm_head.weight is tied.shared.weight
    profiles = [profile_model(config, name="it") for config in (apart, T5)]
    assert [profile.tied_embeddings for profile in profiles] == [False, True]
    assert profiles[0].num_parameters - profiles[1].num_parameters == model.lm_head.weight.numel()


def test_tied_weights_stay_tied() -> None:
    model = whole(TIED)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    to_fake(model, FakeTensorMode(allow_non_fake_inputs=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.device.type == "cpu"


@pytest.mark.parametrize(("config", "heads"), [(LLAMA, 2), (TIED, 1)], ids=["untied", "tied"])
def test_a_head_is_counted_unless_it_is_tied(config: dict[str, Any], heads: int) -> None:
    program = trace_model(config, key())
    root = {p.name: p.numel() for p in program.groups["root"].parameters}
    assert sum(numel == 96 * 32 for numel in root.values()) == heads
    assert ("lm_head.weight" in root) is (heads == 2)
    assert program.num_parameters() == profile_model(config, name="it").num_parameters


@pytest.mark.parametrize(
    ("architectures", "expected", "task"),
    [
        (["LlamaForCausalLM"], "LlamaForCausalLM", "causal-lm"),
        (["LlamaModel"], "LlamaModel", "causal-lm"),
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification", "sequence-classification"),
        ([], "LlamaForCausalLM", "causal-lm"),
        (["NobodysForCausalLM"], "LlamaForCausalLM", "causal-lm"),
    ],
)
def test_the_class_is_the_checkpoints_or_the_causal_one(architectures: list[str], expected: str, task: str) -> None:
    model_class, found = training_class(load_config(varied(LLAMA, architectures=architectures)))
    assert (model_class.__name__, found) == (expected, task)


def test_an_encoder_is_fine_tuned_as_a_classifier() -> None:
    settings = load_config({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    model_class, task = training_class(settings)
    assert (model_class.__name__, task) == ("BertForSequenceClassification", "sequence-classification")


# Sizes out of range never come here: they are refused where a config.json is read.
HOSTILE: list[dict[str, Any]] = [
    {},
    {"model_type": None},
    {"model_type": 7},
    {"model_type": "nobodys"},
    {"model_type": "llama", "hidden_size": "wide"},
    {"model_type": "llama", "num_attention_heads": 0},
    {"model_type": "llama", "num_hidden_layers": "7"},
    {"model_type": "llama", "vocab_size": None},
    {"model_type": "clip"},
]
UNKNOWN_NAMES: list[dict[str, Any]] = [
    {"model_type": "llama", "rope_scaling": {"rope_type": "nobodys"}},
    {"model_type": "llama", "hidden_act": "nobodys"},
]


@pytest.mark.parametrize("fields", [*HOSTILE, *UNKNOWN_NAMES], ids=str)
def test_a_hostile_configuration_gets_one_clear_line(fields: dict[str, Any]) -> None:
    config = LLAMA | fields if fields.get("model_type") == "llama" else fields
    with pytest.raises((ModelConfigError, TraceError)) as caught:
        profile_model(config, name="it")
        trace_model(config, key())
    assert isinstance(caught.value, LaunchkitError)
    assert "\n" not in str(caught.value)


def test_a_configuration_is_left_as_it_was() -> None:
    config = gemma3(*"ssfssfss")
    before = copy.deepcopy(config)
    profile_model(config, name="it")
    assert config == before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embeddings_are_told_by_their_names(name: str) -> None:
    """As the Trainer tells them, by their class; those of relative positions are too small to count."""
    config = load_config(ARCHITECTURES[name])
    model = build_on_meta(training_class(config)[0], config, attention=Attention.EAGER, dtype=torch.bfloat16)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    rows = [(Parameter(name=name, shape=tuple(p.shape), itemsize=2), p) for name, p in model.named_parameters()]

    assert [row.name for row, p in rows if row.is_embedding] == [row.name for row, p in rows if id(p) in tables]
