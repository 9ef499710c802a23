"""Scenario flags: one table for every place they are written, and the defaults of ``estimate``."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from launchkit.errors import IllegalScenarioError, UsageError
from launchkit.hardware import Backend
from launchkit.request import FLAGS, Request, find_flag, resolve, scenario_flags
from launchkit.scenario import (
    Attention,
    Batch,
    Loss,
    Offload,
    Precision,
    Scenario,
    Sharding,
    State,
    StrategyKind,
    Trainer,
)
from tests.report.plans import CLUSTER, MODEL


def test_every_field_has_its_flag() -> None:
    assert [field.name for field in fields(Request)] == [flag.name for flag in FLAGS]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seq_len", "4096", 4096),
        ("seq-len", 4096, 4096),
        ("seq-len", "4_096", 4096),
        ("strategy", "FSDP2", StrategyKind.FSDP2),
        ("fsdp-sharding", "full-shard", Sharding.FULL_SHARD),
        ("fsdp_sharding", "FULL_SHARD", Sharding.FULL_SHARD),
        ("attention", "flash-attention-2", Attention.FLASH_ATTENTION_2),
        ("packing", "true", True),
        ("packing", False, False),
        ("packing", "0", False),
        ("lora-targets", " q_proj,v_proj ", "q_proj,v_proj"),
    ],
)
def test_values_are_read_as_written(name: str, value: object, expected: object) -> None:
    request = Request.from_flags({name: value})
    assert getattr(request, find_flag(name).name) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seq-len", "0", "--seq-len 0 is not a whole number from 1 to 100,000,000; try --seq-len 2048"),
        ("seq-len", "-4", "--seq-len -4 is not a whole number"),
        ("seq-len", "2k", "--seq-len 2k is not a whole number"),
        ("micro-batch", "1e3", "--micro-batch 1e3 is not a whole number"),
        ("micro-batch", str(10**9), "is not a whole number"),
        ("micro-batch", True, "--micro-batch True is not a whole number"),
        ("strategy", "zero4", "--strategy zero4 is unknown; did you mean zero3? it takes single, ddp"),
        ("precision", "int3", "--precision int3 is unknown; use one of|did you mean"),
        ("packing", "maybe", "--packing 'maybe' is neither on nor off; write true or false"),
        ("optimizer", "", "--optimizer '' is no text"),
        ("seqlen", "4", "'seqlen' is no setting of launchkit; did you mean seq_len?"),
        ("ep", 2, "--ep is expert parallelism, which launchkit does not plan; use --strategy fsdp2 or zero3"),
        ("zzz", "4", "'zzz' is no setting of launchkit; see launchkit plan --help"),
    ],
)
def test_bad_values_are_one_line(name: str, value: object, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Request.from_flags({name: value})
    assert any(part in str(raised.value) for part in message.split("|"))
    assert "\n" not in str(raised.value)


def test_what_was_not_given_is_left_open() -> None:
    assert Request.from_flags({"seq_len": None}) == Request()
    assert Request().given() == {}
    assert Request.from_flags({"strategy": "ddp", "packing": False}).given() == {"strategy": "ddp", "packing": False}


def _scenario(**flags: str | int | bool) -> Scenario:
    return resolve(Request.from_flags(flags), model=MODEL, cluster=CLUSTER).scenario


def test_defaults_are_those_of_the_scenario() -> None:
    assert _scenario() == Scenario()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, Batch()),
        ({"micro_batch": 4, "seq_len": 64}, Batch(micro_batch=4, seq_len=64)),
        ({"global_batch": 8}, Batch(gradient_accumulation_steps=8)),
        ({"global_batch": 8, "strategy": "ddp"}, Batch(gradient_accumulation_steps=4)),
        ({"global_batch": 8, "strategy": "ddp", "micro_batch": 4}, Batch(micro_batch=4)),
    ],
)
def test_batches_are_split(flags: dict[str, str | int], expected: Batch) -> None:
    assert _scenario(**flags).batch == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"global_batch": 3, "strategy": "ddp"}, "--global-batch 3 is no multiple of --micro-batch 1 × 2 GPUs; use"),
        ({"global_batch": 1, "micro_batch": 4}, "use --global-batch 4"),
        ({"fp8_all_gather": "false", "precision": "fp8"}, "that FSDP2 gathers for fp8; add --strategy fsdp2"),
        ({"fp8_all_gather": "true", "strategy": "fsdp2"}, "that FSDP2 gathers for fp8; add --strategy fsdp2"),
        ({"fp8_backend": "te"}, "--fp8-backend te says nothing without fp8; add --precision fp8"),
        ({"fsdp_sharding": "full_shard"}, "--fsdp-sharding full_shard says nothing under --strategy single"),
    ],
)
def test_contradictions_are_refused(flags: dict[str, str | int], message: str) -> None:
    with pytest.raises(IllegalScenarioError) as raised:
        _scenario(**flags)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "sharding", "offload_params"),
    [
        ({"strategy": "fsdp2"}, Sharding.FULL_SHARD, False),
        ({"strategy": "hsdp"}, Sharding.HYBRID_SHARD, False),
        ({"strategy": "fsdp", "fsdp_sharding": "shard_grad_op"}, Sharding.SHARD_GRAD_OP, False),
        ({"strategy": "fsdp2", "offload": "params"}, Sharding.FULL_SHARD, True),
        ({"strategy": "zero3", "offload": "params"}, Sharding.FULL_SHARD, False),
    ],
)
def test_strategy_settings_follow_the_flags(flags: dict[str, str], sharding: Sharding, offload_params: bool) -> None:
    strategy = _scenario(**flags).strategy
    assert (strategy.fsdp.sharding, strategy.fsdp.offload_params) == (sharding, offload_params)


def test_a_plain_loop_clips_nothing() -> None:
    assert _scenario(trainer="loop").training.max_grad_norm == 0.0
    assert _scenario().training.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("attentions", "flags", "expected", "says_so"),
    [
        ((Attention.EAGER, Attention.SDPA), {}, Attention.SDPA, False),
        ((Attention.EAGER,), {}, Attention.EAGER, True),
        ((Attention.EAGER,), {"attention": "sdpa"}, Attention.SDPA, False),
        ((), {}, Attention.SDPA, False),
    ],
)
def test_attention_is_one_the_model_has(
    attentions: tuple[Attention, ...], flags: dict[str, str], expected: Attention, says_so: bool
) -> None:
    model = replace(MODEL, attentions=attentions)
    resolution = resolve(Request.from_flags(flags), model=model, cluster=CLUSTER)
    assert resolution.scenario.training.attention is expected
    assert ("Qwen3ForCausalLM has no sdpa attention" in "".join(resolution.notes)) is says_so


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"strategy": "fsdp", "fsdp_sharding": "no_shard", "method": "lora", "lora_rank": 8},
        {"strategy": "fsdp2", "precision": "fp8", "fp8_all_gather": "false"},
        {"strategy": "zero2", "offload": "optimizer", "trainer": "loop", "global_batch": 64, "micro_batch": 2},
        {"strategy": "hsdp", "checkpointing": "full", "packing": True, "compile": True, "state": "first"},
    ],
)
def test_resolved_flags_give_the_same_scenario_again(flags: dict[str, str | int | bool]) -> None:
    scenario = _scenario(**flags)
    resolved = {name: value for name, value in scenario_flags(scenario, cluster=CLUSTER).items() if value is not None}
    assert _scenario(**resolved) == scenario
    assert resolved["gpus"] == "2xRTX-4090"


def test_flags_cover_the_enumerations() -> None:
    assert find_flag("state").parse("first") is State.FIRST
    assert find_flag("trainer").choices == tuple(Trainer)
    assert find_flag("offload").choices == tuple(Offload)
    assert find_flag("seq_len").choices == ()


@pytest.mark.parametrize(
    ("flags", "trainer", "loss"),
    [
        ({}, Trainer.HF, Loss.PLAIN),
        ({"trainer": "trl"}, Trainer.TRL, Loss.CHUNKED),
        ({"loss": "chunked"}, Trainer.TRL, Loss.CHUNKED),
        ({"trainer": "trl", "loss": "liger"}, Trainer.TRL, Loss.LIGER),
        ({"trainer": "trl", "loss": "plain"}, Trainer.TRL, Loss.PLAIN),  # refused, with what to type instead
        ({"trainer": "hf", "loss": "chunked"}, Trainer.HF, Loss.CHUNKED),
        ({"loss": "cce"}, Trainer.HF, Loss.CCE),
    ],
    ids=str,
)
def test_trl_and_its_loss_stand_for_each_other(flags: dict[str, str], trainer: Trainer, loss: Loss) -> None:
    training = _scenario(**flags).training
    assert (training.trainer, training.loss) == (trainer, loss)


FOUR = replace(CLUSTER, node=replace(CLUSTER.node, num_gpus=4))


def _on_four(**flags: str | int | bool) -> Scenario:
    return resolve(Request.from_flags(flags), model=MODEL, cluster=FOUR).scenario


@pytest.mark.parametrize(
    ("flags", "kind", "global_batch"),
    [
        ({"tp": 4}, "single", 1),  # as many as there are GPUs
        ({"tp": 2}, "fsdp2", 2),
        ({"cp": 4}, "fsdp2", 1),
        ({"sp": 2}, "zero3", 2),
        ({"tp": 2, "strategy": "hsdp"}, "hsdp", 2),
        ({"tp": 1}, "single", 1),
    ],
)
def test_ranks_that_share_a_step_choose_their_engine(flags: dict[str, str | int], kind: str, global_batch: int) -> None:
    resolved = _on_four(**flags)
    assert resolved.strategy.kind == kind
    assert scenario_flags(resolved, cluster=FOUR)["global_batch"] == global_batch
    again = _on_four(**{name: value for name, value in scenario_flags(resolved, cluster=FOUR).items() if value})
    assert again.strategy == resolved.strategy


def test_a_global_batch_is_shared_among_groups() -> None:
    with pytest.raises(IllegalScenarioError, match="no multiple of --micro-batch 1 × 2 groups of 2 GPUs; use"):
        _on_four(tp=2, strategy="fsdp2", global_batch=3)


@pytest.mark.parametrize(
    ("flags", "gpu_is_cuda", "conf"),
    [
        ({}, True, ""),
        ({"alloc_conf": "expandable_segments:True, max_split_size_mb:128"}, True, None),
        ({"alloc_conf": "max_split_size_mb:128"}, False, ""),
        ({"trainer": "axolotl"}, True, "expandable_segments:True"),
        ({"trainer": "axolotl"}, False, ""),
        ({"trainer": "axolotl", "alloc_conf": "expandable_segments:False"}, True, "expandable_segments:False"),
    ],
)
def test_what_the_allocator_is_told(flags: dict[str, object], gpu_is_cuda: bool, conf: str | None) -> None:
    """What was asked for, else what Axolotl tells it; a CPU has no such allocator."""
    backend = Backend.CUDA if gpu_is_cuda else Backend.CPU
    gpus = replace(CLUSTER, gpu=replace(CLUSTER.gpu, backend=backend))
    scenario = resolve(Request.from_flags(flags), model=MODEL, cluster=gpus).scenario
    expected = "expandable_segments:True,max_split_size_mb:128" if conf is None else conf
    assert scenario.alloc_conf == expected
    assert scenario_flags(scenario, cluster=gpus)["alloc_conf"] == (expected or None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "expandable:True",
            "PYTORCH_ALLOC_CONF has an option 'expandable' that is not modelled; use expandable_segments",
        ),
        ("expandable_segments:yes", "PYTORCH_ALLOC_CONF has 'expandable_segments:yes'; write True or False"),
    ],
)
def test_what_no_allocator_understands(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(Request(alloc_conf=text), model=MODEL, cluster=CLUSTER)


def test_axolotl_keeps_the_weights_as_it_loads_them_and_pads_what_it_does_not_pack() -> None:
    alone = _scenario(trainer="axolotl").training
    assert (alone.precision, alone.padding) == (Precision.BF16_PARAMS, True)
    assert _scenario(trainer="axolotl", precision="bf16").training.precision is Precision.BF16
    assert _on_four(trainer="axolotl", strategy="fsdp2").training.precision is Precision.BF16
    assert not _scenario(trainer="axolotl", packing=True).training.padding
    assert not _scenario(trainer="axolotl", padding=False).training.padding
    assert not _scenario().training.padding and _scenario(padding=True).training.padding
    with pytest.raises(IllegalScenarioError, match="give one of them"):
        _scenario(packing=True, padding=True)
