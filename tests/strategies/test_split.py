"""Ranks that share a step: what is refused, which ranks there are, what a rank's rewrite holds."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from launchkit import strategies
from launchkit.program import Group, Owner, Parameter, Phase, Point, StepProgram
from launchkit.scenario import Scenario, Split
from launchkit.simulate.clock import Job, group_size
from launchkit.strategies.fsdp2 import Layout
from launchkit.strategies.split import mesh_of
from tests.builders import cluster, profile, scenario

needs_torch = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="traces a model")
BF16: dict[str, Any] = {"precision": "bf16", "trainer": "hf"}


def split_scenario(**values: Any) -> Scenario:
    degrees = {name: values.pop(name) for name in ("tp", "cp", "sp") if name in values}
    return scenario(split=Split(**degrees), **(BF16 | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": 2, "strategy": "ddp"}, "--tp 2 does not go with --strategy ddp; use --strategy fsdp2 or hsdp"),
        ({"tp": 2, "strategy": "zero3"}, "--tp 2 does not go with --strategy zero3"),
        ({"cp": 2, "strategy": "single"}, "--cp 2 does not go with --strategy single; use --strategy fsdp2 or hsdp"),
        ({"sp": 2, "strategy": "fsdp2"}, "--sp 2 does not go with --strategy fsdp2; use --strategy zero1 or zero2"),
        ({"tp": 2, "cp": 2, "strategy": "fsdp2"}, "--tp 2 with --cp 2 needs accelerate to split the weights"),
        ({"cp": 2, "sp": 2, "strategy": "fsdp2"}, "--cp 2 and --sp 2 both share out the sequence"),
        ({"tp": 16, "strategy": "single"}, "--tp 16 takes 16 GPUs and 8× RTX 4090 has 8"),
        ({"tp": 3, "strategy": "fsdp2"}, "--tp 3 does not divide 8 GPUs; use a divisor of 8"),
        ({"tp": 8, "strategy": "fsdp2"}, "leaves --strategy fsdp2 nothing to shard; use --strategy single"),
        (
            {"tp": 2, "strategy": "fsdp2", "method": "lora"},
            "as wide as FSDP's shards; use --tp 8, which leaves nothing",
        ),
        ({"tp": 2, "strategy": "hsdp", "method": "lora"}, "does not run under --strategy hsdp"),
        ({"tp": 8, "strategy": "single", "method": "qlora"}, "finds no 4-bit weights in split ones; use --method lora"),
        ({"tp": 8, "strategy": "single", "method": "lora", "dora": True}, "leave out --dora"),
        ({"tp": 8, "strategy": "single", "method": "lora", "trainer": "axolotl"}, "fails in Axolotl"),
        (
            {"tp": 8, "strategy": "single", "method": "lora", "lora_targets": "experts.down_proj"},
            "does not run on fused experts, which are split; use --lora-targets attention",
        ),
        ({"tp": 2, "strategy": "fsdp2", "offload": "all"}, "--tp 2 with --offload all is not modelled"),
        ({"tp": 2, "strategy": "fsdp2", "optimizer": "adamw_bnb_8bit"}, "adamw_bnb_8bit cannot step on split tensors"),
        ({"tp": 2, "strategy": "fsdp2", "compile": True}, "--tp 2 is not modelled under torch.compile"),
        ({"tp": 2, "strategy": "fsdp2", "packing": True}, "leave out --packing"),
        ({"tp": 2, "strategy": "fsdp2", "loss": "liger"}, "use --trainer hf --loss plain"),
        ({"cp": 2, "strategy": "fsdp2", "attention": "eager"}, "--cp 2 works with sdpa attention alone, not eager"),
        ({"cp": 2, "strategy": "fsdp2", "precision": "fp32"}, "torch's flash kernel, which takes no fp32"),
        ({"cp": 4, "strategy": "fsdp2", "seq_len": 2044}, "is not cut into 8 equal pieces"),
        ({"sp": 2, "strategy": "zero3", "attention": "eager"}, "--sp 2 does not work with eager attention"),
        ({"sp": 4, "strategy": "zero3", "seq_len": 2046}, "use --seq-len 2044"),
    ],
)
def test_refusals_are_one_line(values: dict[str, Any], message: str) -> None:
    reason = strategies.refusal(split_scenario(**values), profile(), cluster(num_gpus=8))
    assert reason is not None
    assert message in reason
    assert "; " in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    "values",
    [
        {"tp": 8, "strategy": "single"},
        {"tp": 8, "strategy": "single", "method": "lora", "lora_dropout": 0.1, "rslora": True},
        {"tp": 4, "strategy": "fsdp2"},
        {"cp": 8, "strategy": "fsdp2", "method": "lora"},
        {"cp": 2, "strategy": "fsdp2", "offload": "all"},
        {"sp": 8, "strategy": "zero3"},
        {"sp": 2, "strategy": "zero2", "attention": "flash_attention_2"},
    ],
)
def test_what_runs_is_not_refused(values: dict[str, Any]) -> None:
    assert strategies.refusal(split_scenario(**values), profile(), cluster(num_gpus=8)) is None


@pytest.mark.parametrize(
    ("split", "heads", "key_value_heads", "message"),
    [
        (Split(tp=4), 6, 2, "has 6 attention heads, which --tp 4 does not divide; use a divisor of 6"),
        (Split(tp=4), 8, 2, "has 2 key and value heads, which --tp 4 does not divide"),
        (Split(sp=4), 6, 2, "has 6 attention heads, which --sp 4 does not divide"),
        (Split(sp=4), 8, 2, None),  # Ulysses repeats keys and values
        (Split(cp=4), 6, 2, None),  # a ring shares out no heads
        (Split(tp=2), 0, 0, None),  # nobody knows
    ],
)
def test_heads_stay_whole(split: Split, heads: int, key_value_heads: int, message: str | None) -> None:
    kind = "zero3" if split.sp > 1 else "fsdp2"
    model = profile(num_attention_heads=heads, num_key_value_heads=key_value_heads)
    reason = strategies.refusal(scenario(strategy=kind, split=split, **BF16), model, cluster(num_gpus=8))
    assert reason is None if message is None else message in (reason or "")


@pytest.mark.parametrize(
    ("fields", "split", "is_refused"),
    [
        ({"layer_types": ("full_attention", "sliding_attention")}, Split(cp=2), True),
        ({"sliding_window": 4096}, Split(cp=2), True),
        ({"layer_types": ("full_attention",)}, Split(cp=2), False),
        ({"layer_types": ("full_attention", "linear_attention")}, Split(sp=2), True),
        ({"sliding_window": 4096}, Split(sp=2), False),
        ({"layer_types": ("full_attention", "sliding_attention")}, Split(tp=2), False),
    ],
)
def test_attention_that_sees_less_than_all_goes_round_no_ring(
    fields: dict[str, Any], split: Split, is_refused: bool
) -> None:
    kind = "zero3" if split.sp > 1 else "fsdp2"
    reason = strategies.refusal(scenario(strategy=kind, split=split, **BF16), profile(**fields), cluster(num_gpus=8))
    assert (reason is not None) is is_refused


@pytest.mark.parametrize(
    ("values", "num_nodes", "expected"),
    [
        ({"strategy": "ddp"}, 1, (8, 1, 1, 1, 1)),
        ({"strategy": "fsdp2"}, 1, (1, 8, 1, 1, 1)),
        ({"strategy": "hsdp"}, 2, (2, 8, 1, 1, 1)),
        ({"strategy": "zero3"}, 1, (1, 8, 1, 1, 1)),
        ({"strategy": "single", "tp": 8}, 1, (1, 1, 8, 1, 1)),
        ({"strategy": "fsdp2", "tp": 2}, 1, (1, 4, 2, 1, 1)),
        ({"strategy": "hsdp", "tp": 2}, 2, (2, 4, 2, 1, 1)),
        ({"strategy": "fsdp2", "cp": 2}, 1, (1, 4, 1, 2, 1)),
        ({"strategy": "hsdp", "cp": 8}, 2, (2, 1, 1, 8, 1)),
        ({"strategy": "zero3", "sp": 4}, 1, (1, 2, 1, 1, 4)),
    ],
)
def test_the_mesh_holds_every_rank_once(values: dict[str, Any], num_nodes: int, expected: tuple[int, ...]) -> None:
    mesh = mesh_of(split_scenario(**values).strategy, cluster(num_gpus=8, num_nodes=num_nodes))
    assert tuple(mesh.values()) == expected
    product = 1
    for size in mesh.values():
        product *= size
    assert product == 8 * num_nodes


@pytest.mark.parametrize(
    ("split", "shard_group_size", "expected"),
    [
        (Split(), 0, {Group.WORLD: 16, Group.SHARD: 16, Group.REPLICATE: 1, Group.COPY: 1}),
        (Split(tp=2), 8, {Group.SHARD: 8, Group.REPLICATE: 1, Group.COPY: 2}),
        (Split(tp=2), 4, {Group.SHARD: 4, Group.REPLICATE: 2, Group.COPY: 2}),
        (Split(cp=4), 8, {Group.SHARD: 8, Group.REPLICATE: 2, Group.COPY: 4}),
    ],
)
def test_groups_on_the_clock(split: Split, shard_group_size: int, expected: dict[Group, int]) -> None:
    hardware = cluster(num_gpus=8, num_nodes=2)
    job = Job(cluster=hardware, compute=Any, split=split, shard_group_size=shard_group_size)  # type: ignore[arg-type]
    assert {group: group_size(job, group) for group in expected} == expected


@pytest.mark.parametrize(
    ("values", "reduced_itemsize", "adds_in_place", "defers_reduction"),
    [
        ({"strategy": "fsdp2"}, 0, True, True),  # accelerate's: in the dtype of the gradients
        ({"strategy": "fsdp2", "tp": 2}, 4, False, True),  # transformers': in fp32, which micro-batches pile up in
        ({"strategy": "fsdp2", "tp": 2, "precision": "fp32"}, 0, True, True),
        ({"strategy": "hsdp", "tp": 2}, 4, False, False),  # only the replicas wait for each other
        ({"strategy": "fsdp2", "tp": 2, "trainer": "loop"}, 0, False, False),
    ],
)
def test_whose_fsdp_it_is_decides_how_gradients_are_reduced(
    values: dict[str, Any], reduced_itemsize: int, adds_in_place: bool, defers_reduction: bool
) -> None:
    built = split_scenario(gradient_accumulation_steps=2, **values)
    layout = Layout.of(built, cluster(num_gpus=8, num_nodes=2))
    assert layout.reduced_itemsize == reduced_itemsize
    assert (layout.adds_in_place, layout.defers_reduction) == (adds_in_place, defers_reduction)


def test_a_rank_holds_its_part_of_a_wide_gradient_only_for_the_optimizer() -> None:
    wide = Parameter(name="embed", shape=(50, 4), itemsize=4, gradient_numel=400)
    assert (wide.num_bytes(), wide.gradient_bytes()) == (800, 1600)


def _weight_bytes(rewritten: StepProgram, program: StepProgram) -> int:
    """What a rewrite holds of the parameters, without the model's buffers."""
    return sum(
        p.size.at(Point(1, 1)) * p.count
        for p in rewritten.persistent
        if p.owner is Owner.WEIGHTS and p not in program.persistent
    )


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_fsdp2_shards_what_a_rank_holds() -> None:
    """Half of every matrix, and of that a quarter; norms in quarters."""
    from launchkit.trace import trace_model
    from tests.trace.models import LLAMA, key

    program = trace_model(LLAMA, key(tp=2))
    common: dict[str, Any] = {"precision": "fp32", "trainer": "loop", "split": Split(tp=2)}
    alone = strategies.rewrite(program, scenario=scenario(**common), cluster=cluster(num_gpus=2))
    sharded = strategies.rewrite(program, scenario=scenario(strategy="fsdp2", **common), cluster=cluster(num_gpus=8))
    assert _weight_bytes(sharded, program) == _weight_bytes(alone, program) // 4
    kinds = {c.group for section in sharded.sections for c in section.collectives}
    assert kinds == {Group.COPY, Group.SHARD}


@needs_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("trainer", "is_averaged"), [("loop", False), ("hf", True)])
def test_the_trainer_averages_what_is_not_split(trainer: str, is_averaged: bool) -> None:
    """Of each adapter the matrix that every rank has: seven a layer, each as wide as the hidden size, in fp32."""
    from launchkit.trace import trace_model
    from tests.trace.models import LLAMA, LORA, key

    program = trace_model(LLAMA, key(tp=2, **LORA))
    values: dict[str, Any] = {"precision": "fp32", "trainer": trainer, "split": Split(tp=2), "method": "lora"}
    rewritten = strategies.rewrite(program, scenario=scenario(lora_rank=8, **values), cluster=cluster(num_gpus=2))
    (stage,) = (s for s in rewritten.stages if s.phase is Phase.OPTIMIZER)
    sent = [c.num_bytes.at(Point(2, 128, 8)) for c in rewritten.section_of(stage, 0).collectives]
    assert sent == [8 * 32 * 4] * (7 * program.group_counts["LlamaDecoderLayer"] if is_averaged else 0)
