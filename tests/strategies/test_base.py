"""What the rewrites share, the single-GPU rewrite, and the table of engines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchkit import strategies
from launchkit.errors import IllegalScenarioError, TraceError
from launchkit.program import Alloc, Event, Free, Owner, Phase, Section, Size, Stage, local
from launchkit.scenario import Attention, Compute, DeviceKind, Split
from launchkit.strategies.base import (
    accumulate_gradients,
    arriving_gradients,
    map_layers,
    whole_tensors,
    with_an_end,
    with_ready_gradients,
)
from tests.builders import cluster, profile, scenario
from tests.strategies.small import NUM_ELEMENTS, end, most, peak, plain, program, ranks, start

WEIGHTS = GRADIENTS = 4 * NUM_ELEMENTS
STEP_SCALARS = 4 * 8  # fused AdamW keeps its step counts on the device: eight tensors


def single(**overrides: Any) -> Any:
    return strategies.rewrite(program(), scenario=plain(**overrides), cluster=ranks(1))


def test_single_gpu_holds_weights_gradients_and_states() -> None:
    """The peak of this step is its last gradient: weights, states, gradients, and that gradient's input."""
    rewritten = single()
    states = 2 * WEIGHTS + STEP_SCALARS
    assert start(rewritten) == {Owner.WEIGHTS: WEIGHTS, Owner.OPTIMIZER_STATES: states}
    assert peak(rewritten) == WEIGHTS + states + GRADIENTS + 8
    assert end(rewritten) == WEIGHTS + states


def test_first_step_allocates_the_states() -> None:
    rewritten = single(state="first")
    assert start(rewritten) == {Owner.WEIGHTS: WEIGHTS}
    assert end(rewritten) == 3 * WEIGHTS + STEP_SCALARS


@pytest.mark.parametrize(
    ("optimizer", "temporary_bytes"),
    [("adamw_torch_fused", 8), ("sgd", 8), ("adamw_torch", WEIGHTS), ("adagrad", 2 * WEIGHTS)],
)
def test_temporaries_of_the_update(optimizer: str, temporary_bytes: int) -> None:
    """foreach updates on a GPU make lists as large as the parameters."""
    assert most(single(optimizer=optimizer), Owner.TEMPORARIES) == temporary_bytes


def test_the_optimizer_meets_parameters_in_the_models_order() -> None:
    """The embedding, the blocks, the head: who is next to whom decides what a loop over tensors holds at once."""
    tensors = whole_tensors(program(), scenario=plain())
    assert [(tensor.numel, tensor.in_block) for tensor in tensors] == [
        (100, False), *[(60, True), (4, True)] * 3, (100, False)
    ]  # fmt: skip


def test_accumulation_keeps_gradients_once() -> None:
    """Gradients of earlier micro-batches are there from the start, and the last one's are added to them."""
    rewritten = single(gradient_accumulation_steps=4)
    assert start(rewritten)[Owner.GRADIENTS] == GRADIENTS
    assert most(rewritten, Owner.GRADIENTS) == GRADIENTS
    assert most(rewritten, Owner.TEMPORARIES) == 4 * 100 + 8
    assert end(rewritten) == end(single())


def test_clipping_is_the_trainers() -> None:
    assert most(single(trainer="hf", optimizer="sgd"), Owner.TEMPORARIES) == 2 * 4 * 8
    assert most(single(trainer="hf", optimizer="sgd", max_grad_norm=0.0), Owner.TEMPORARIES) == 8


@pytest.mark.parametrize("optimizer", ["galore_adamw", "apollo_adamw"])
def test_an_update_in_the_backward_drops_each_gradient_at_once(optimizer: str) -> None:
    """The same states, and no more than the largest gradient."""
    whole, layerwise = single(optimizer=optimizer), single(optimizer=f"{optimizer}_layerwise")
    assert start(layerwise) == start(whole)
    assert most(whole, Owner.GRADIENTS) == GRADIENTS
    assert most(layerwise, Owner.GRADIENTS) == 4 * 100
    assert end(layerwise) == end(whole)
    first = single(optimizer=f"{optimizer}_layerwise", state="first")
    assert end(first) == end(layerwise)


def test_paged_states_are_counted_on_the_host() -> None:
    big = program()
    rewritten = strategies.rewrite(big, scenario=plain(optimizer="paged_adamw_32bit"), cluster=ranks(1))
    assert rewritten.host_persistent_bytes == 0  # every tensor here is too small to page
    assert start(rewritten)[Owner.OPTIMIZER_STATES] == 2 * WEIGHTS


def alloc(slot: int, *, parameter: int = -1) -> Alloc:
    return Alloc(slot, Size.constant(4), Owner.GRADIENTS, parameter)


def free(slot: int) -> Free:
    return Free(local("s", slot), Size.constant(4))


@pytest.mark.parametrize(
    ("events", "ready_after"),
    [
        ((alloc(0, parameter=0),), [0]),
        ((alloc(0, parameter=0), alloc(1)), [1]),
        ((alloc(0, parameter=0), free(9), alloc(1)), [1]),
        ((alloc(0, parameter=0), alloc(1), free(9), free(8), alloc(2)), [3]),
        ((alloc(0, parameter=0), alloc(1, parameter=1), free(9), alloc(2)), [2, 2]),
        ((alloc(0, parameter=0), free(9), alloc(1, parameter=1), free(8)), [1, 3]),
        ((free(9), alloc(1), free(1)), []),
    ],
)
def test_gradients_are_ready_behind_their_operators_frees(events: tuple[Event, ...], ready_after: list[int]) -> None:
    found = [place for place, (_, ready) in enumerate(with_ready_gradients(events)) for _ in ready]
    assert found == ready_after


def test_gradients_arrive_from_the_last_layer_to_the_first() -> None:
    sizes = [num_bytes for _, num_bytes in arriving_gradients(program(), rank=0)]
    assert sizes == [400, *(16, 240) * 3, 400]


def test_unchanged_layers_share_their_section() -> None:
    mapped = map_layers(program(), Phase.BACKWARD, lambda *at: None, lambda stage, layer, section, _: section)
    assert mapped.sections == program().sections
    assert mapped.stages == program().stages


def test_layers_of_one_decision_are_changed_once() -> None:
    """The last layer is told apart; the two others share what was made of the first of them that runs."""
    changed: list[tuple[str, int]] = []

    def change(stage: Stage, layer: int, section: Section, is_last: bool) -> Section:
        changed.append((stage.name, layer))
        return replace(section, uses=(int(is_last),))

    mapped = map_layers(program(), Phase.BACKWARD, lambda stage, layer, section: layer == 2, change)
    stage = next(stage for stage in mapped.stages if stage.phase is Phase.BACKWARD and stage.stack)
    assert [mapped.section_of(stage, layer).uses for layer in range(3)] == [(0,), (0,), (1,)]
    assert [layer for name, layer in changed if name == stage.name] == [2, 1]


def test_accumulated_gradients_leave_nothing_in_the_program() -> None:
    owners = {
        event.owner
        for section in accumulate_gradients(program()).sections
        for event in section.events
        if isinstance(event, Alloc)
    }
    assert Owner.GRADIENTS not in owners


@pytest.mark.parametrize(
    ("strategy", "precision", "compute"),
    [
        ("single", "fp32", Compute.FP32),
        ("single", "bf16", Compute.AUTOCAST_BF16),
        ("ddp", "bf16", Compute.AUTOCAST_BF16),
        ("ddp", "fp16", Compute.AUTOCAST_FP16),
        ("single", "bf16-params", Compute.BF16_AUTOCAST),
        ("single", "bf16-pure", Compute.BF16),
        ("zero2", "bf16", Compute.BF16),
        ("zero3", "bf16-params", Compute.BF16),
        ("zero1", "fp16", Compute.FP16),
        ("zero1", "fp32", Compute.FP32),
    ],
)
def test_compute_of_a_precision(strategy: str, precision: str, compute: Compute) -> None:
    chosen = scenario(strategy=strategy, precision=precision)
    key = strategies.trace_key(chosen.training, chosen.strategy, DeviceKind.CUDA)
    assert key.compute is compute
    assert key.lora_targets == ""
    assert not key.cast_adapters


def test_deepspeed_casts_adapters() -> None:
    """PEFT keeps adapters in fp32; the engine casts the module as a whole."""
    for strategy, casts in (("zero2", True), ("ddp", False)):
        chosen = scenario(strategy=strategy, method="lora", precision="bf16")
        key = strategies.trace_key(chosen.training, chosen.strategy, DeviceKind.CUDA, single_sequence=True)
        assert key.cast_adapters is casts
        assert key.text.endswith("all-linear/b1/cast" if casts else "all-linear/b1")


@pytest.mark.parametrize(
    ("overrides", "casts", "checkpointing"),
    [
        ({"strategy": "single", "method": "qlora"}, True, "full"),
        ({"strategy": "ddp", "method": "qlora"}, True, "full"),
        ({"strategy": "single", "method": "lora"}, False, "full"),
        ({"strategy": "single", "method": "qlora", "trainer": "hf"}, False, "full"),
        ({"strategy": "zero3", "method": "lora"}, True, "reentrant"),
        ({"strategy": "zero3", "method": "lora", "trainer": "hf"}, True, "full"),
        ({"strategy": "zero3", "method": "lora", "checkpointing": "none"}, True, "none"),
        ({"strategy": "zero3"}, False, "full"),
        ({"strategy": "zero2", "method": "lora"}, True, "full"),
    ],
)
def test_trl_has_habits_with_adapters(overrides: dict[str, Any], casts: bool, checkpointing: str) -> None:
    flags = {"trainer": "trl", "loss": "chunked", "precision": "bf16", "checkpointing": "full", **overrides}
    chosen = scenario(**flags | ({"loss": "plain"} if flags["trainer"] == "hf" else {}))
    key = strategies.trace_key(chosen.training, chosen.strategy, DeviceKind.CUDA)
    assert key.cast_adapters is casts
    assert key.checkpointing == checkpointing


FP8_GPU = {"compute_capability": (8, 9)}
HOPPER = {"compute_capability": (9, 0)}
TE = {"precision": "fp8", "fp8_backend": "te", "strategy": "ddp"}


@pytest.mark.parametrize(
    ("overrides", "hardware", "message"),
    [
        ({"precision": "bf16"}, {"bf16_flops_per_s": 0.0}, "has no bf16; use --precision fp16"),
        ({"loss": "chunked"}, {}, "--loss chunked is that of TRL's trainer; add --trainer trl"),
        ({"loss": "plain", "trainer": "trl"}, {}, "use --loss chunked or --trainer hf"),
        ({"loss": "cce", "trainer": "trl"}, {}, "TRL has no cut cross-entropy"),
        ({"loss": "chunked", "trainer": "axolotl"}, {}, "Axolotl compiles its chunked loss"),
        ({"loss": "liger"}, {"backend": "cpu"}, "--loss liger is made of kernels for GPUs; use --loss plain"),
        ({"loss": "cce", "strategy": "single", "precision": "bf16"}, {}, "use --precision bf16-params"),
        ({"precision": "fp8"}, {"compute_capability": (8, 6)}, "has no fp8; use --precision bf16, or a GPU of compute"),
        ({"precision": "fp8", "method": "lora"}, FP8_GPU, "makes gradients of frozen weights too, and drops them; use"),
        ({"precision": "fp8", "method": "qlora"}, FP8_GPU, "takes packed 4-bit layers for linear ones"),
        ({"precision": "fp8", "strategy": "zero3"}, FP8_GPU, "no fp8 beside DeepSpeed's file; use --strategy fsdp2"),
        (
            {"precision": "fp8", "strategy": "fsdp"},
            FP8_GPU,
            "goes with FSDP2, not with the flat parameters of FSDP1; u",
        ),
        ({"precision": "fp8", "split": Split(tp=2)}, FP8_GPU, "fp8 with TP 2 is not modelled; use --precision bf16"),
        (
            {"precision": "fp8", "strategy": "fsdp2", "offload": "all"},
            FP8_GPU,
            "fp8 with --offload all is not modelled",
        ),
        (
            {"optimizer": "lomo", "strategy": "ddp"},
            {},
            "lomo updates inside the backward pass of one process; use --st",
        ),
        (
            {"optimizer": "adalomo", "precision": "fp16"},
            {},
            "adalomo never unscales what accelerate scales for --precision fp16; use --precision bf16",
        ),
        (
            {"optimizer": "grokadamw", "strategy": "fsdp2"},
            {},
            "grokadamw keeps states on the host, where no engine looks for them; use --strategy ddp",
        ),
        (TE, {"compute_capability": (8, 6)}, "of compute capability 8.9 or later, which RTX 4090 is not; use --prec"),
        (TE, {"backend": "cpu"}, "Transformer Engine's fp8 takes an NVIDIA GPU"),
        (TE | {"trainer": "axolotl"}, FP8_GPU, "Axolotl hands accelerate torchao's recipe; use --fp8-backend ao"),
        (TE | {"strategy": "fsdp2"}, FP8_GPU, "under FSDP2 and never turns their 8 bits on; use --fp8-backend ao, or"),
        (TE | {"strategy": "fsdp"}, FP8_GPU, "under FSDP1 the Trainer hands them over apart; use --strategy fsdp2 --"),
        (TE | {"strategy": "zero2"}, FP8_GPU, "under DeepSpeed is not modelled; use --strategy ddp, or --fp8-backend"),
        (TE | {"seq_len": 2056}, FP8_GPU, "take a multiple of 16 tokens, which --micro-batch 1 × --seq-len 2056 is no"),
        (TE | {"seq_len": 2052}, {"compute_capability": (10, 0)}, "a multiple of 8 tokens, which --micro-batch 1 × "),
        (TE | {"method": "lora"}, FP8_GPU, "makes gradients of frozen weights too, and drops them; use --precision b"),
        ({"checkpointing": "selective", "strategy": "fsdp2"}, {}, "does not exist under --strategy fsdp2; use --check"),
        ({"checkpointing": "reentrant", "strategy": "fsdp"}, {}, "reentrant does not exist under --strategy fsdp; use"),
        (
            {"checkpointing": "selective", "strategy": "zero3", "method": "lora", "trainer": "trl", "loss": "chunked"},
            {},
            "under ZeRO-3 the checkpoints of TRL's adapters are re-entered, and --checkpointing selective cannot be",
        ),
        ({"checkpointing": "offload", "strategy": "hsdp"}, {}, "does not exist under --strategy hsdp; use --check"),
        ({"attention": "flash_attention_2"}, {"compute_capability": (7, 5)}, "use --attention sdpa"),
        ({"attention": "flash_attention_2", "precision": "fp32"}, {}, "does not take fp32"),
        ({"attention": "flash_attention_3"}, {"compute_capability": (8, 0)}, "flash_attention_3 does not run on"),
        ({"attention": "flash_attention_3"}, {"compute_capability": (10, 0)}, "use --attention sdpa"),
        ({"attention": "flash_attention_3", "precision": "fp32"}, HOPPER, "flash_attention_3 does not take fp32"),
        ({"strategy": "ddp", "optimizer": "galore_adamw_layerwise"}, {}, "use --strategy single"),
        (
            {"strategy": "single", "optimizer": "apollo_adamw_layerwise", "gradient_accumulation_steps": 2},
            {},
            "cannot accumulate gradients; use --global-batch",
        ),
        ({"strategy": "fsdp2", "optimizer": "galore_adamw"}, {}, "shards them; use --strategy ddp"),
        ({"strategy": "ddp", "freeze": "mlp", "method": "lora"}, {}, "leave out --freeze"),
        ({"strategy": "ddp", "freeze": "mlp", "checkpointing": "reentrant"}, {}, "use --checkpointing full"),
        ({"strategy": "ddp", "freeze": "mlp", "precision": "fp8"}, {}, "use --precision bf16"),
        ({"strategy": "fsdp2", "freeze": "mlp", "split": Split(tp=2)}, {}, "leave out one of them"),
        ({"strategy": "fsdp", "freeze": "mlp", "use_orig_params": False}, {}, "set it to true"),
        ({"strategy": "single", "offload": "optimizer"}, {}, "--offload optimizer needs an engine that moves tensors"),
        ({"strategy": "ddp", "offload": "all"}, {}, "--offload all needs an engine that moves tensors"),
        ({"strategy": "zero2", "offload": "all"}, {}, "ZeRO-2 does not shard; use --strategy zero3"),
        ({"strategy": "zero3", "offload": "params"}, {}, "use --offload all"),
        ({"strategy": "zero3", "offload": "nvme"}, {}, "needs a directory on a local disk"),
        ({"strategy": "zero2", "offload": "optimizer", "optimizer": "lion_8bit"}, {}, "has no CPU kernel in DeepSpeed"),
    ],
)
def test_refusals(overrides: dict[str, Any], hardware: dict[str, Any], message: str) -> None:
    refused = strategies.refusal(scenario(**overrides), profile(), cluster(**hardware))
    assert refused is not None
    assert message in refused
    assert "\n" not in refused


@pytest.mark.parametrize(
    "overrides",
    [
        {"strategy": "single"},
        {"strategy": "ddp", "precision": "fp16"},
        {"strategy": "zero1", "offload": "optimizer"},
        {"strategy": "zero3", "offload": "all"},
        {"strategy": "zero3", "offload": "nvme", "nvme_path": "/local"},
        {"strategy": "single", "attention": "flash_attention_2"},
        {"strategy": "zero3", "freeze": "mlp"},
    ],
)
def test_what_is_not_refused(overrides: dict[str, Any]) -> None:
    assert strategies.refusal(scenario(**overrides), profile(), cluster()) is None


def test_hopper_has_flash_attention_3() -> None:
    assert strategies.refusal(scenario(attention="flash_attention_3"), profile(), cluster(**HOPPER)) is None


def test_a_classifier_that_would_be_quantised_cannot_be_trained() -> None:
    bert = profile(name="bert", task="sequence-classification", quantises_head=True)
    refused = strategies.refusal(scenario(method="qlora"), bert, cluster())
    assert refused is not None and refused.endswith("use --method lora")
    assert strategies.refusal(scenario(method="lora"), bert, cluster()) is None


def test_refusal_names_the_attention_that_a_model_has() -> None:
    bloom = profile(name="bloom", attentions=(Attention.EAGER,))
    refused = strategies.refusal(scenario(attention="sdpa"), bloom, cluster())
    assert refused == "bloom has no sdpa attention; use --attention eager"


def test_refusal_of_an_unknown_optimizer() -> None:
    with pytest.raises(IllegalScenarioError, match="unknown optimizer 'adamv'"):
        strategies.refusal(scenario(optimizer="adamv"), profile(), cluster())


@settings(deadline=None)
@given(num_gpus=st.sampled_from([1, 2, 4, 8]), strategy=st.sampled_from(["ddp", "zero1", "zero2", "zero3"]))
def test_more_gpus_never_take_more_master_weights_or_states(num_gpus: int, strategy: str) -> None:
    def held(number: int) -> int:
        chosen = plain(strategy=strategy, reduce_bucket_size=64, precision="bf16")
        rewritten = strategies.rewrite(program(itemsize=2), scenario=chosen, cluster=ranks(number))
        at_start = start(rewritten)
        return at_start.get(Owner.MASTER_WEIGHTS, 0) + at_start.get(Owner.OPTIMIZER_STATES, 0)

    assert held(2 * num_gpus) <= held(num_gpus)


@pytest.mark.parametrize(
    ("overrides", "compute", "pads", "gathers"),
    [
        ({"strategy": "single"}, Compute.AUTOCAST_FP8, True, False),
        ({"strategy": "ddp"}, Compute.AUTOCAST_FP8, True, False),
        ({"strategy": "ddp", "trainer": "axolotl"}, Compute.AUTOCAST_FP8, False, False),
        ({"strategy": "fsdp2"}, Compute.FP8_AUTOCAST, True, True),
        ({"strategy": "hsdp"}, Compute.FP8_AUTOCAST, True, True),
        ({"strategy": "fsdp2", "float8_all_gather": False}, Compute.FP8_AUTOCAST, True, False),
    ],
)
def test_fp8_is_traced_as_the_engine_sets_it_up(
    overrides: dict[str, Any], compute: Compute, pads: bool, gathers: bool
) -> None:
    chosen = scenario(precision="fp8", **overrides)
    key = strategies.trace_key(chosen.training, chosen.strategy, DeviceKind.CUDA)
    assert (key.compute, key.pads_float8, key.gathers_float8) == (compute, pads, gathers)
    assert strategies.refusal(chosen, profile(), cluster(**FP8_GPU, num_nodes=2)) is None


def test_a_tied_head_is_not_given_to_transformer_engine() -> None:
    """Whose copy of it no optimizer has; one with a side that 16 does not divide stays as it is."""
    chosen, machine = scenario(**TE), cluster(**FP8_GPU)
    for vocab_size, is_refused in ((96, True), (100, False)):
        tied = profile(tied_embeddings=True, vocab_size=vocab_size, hidden_size=64)
        reason = strategies.refusal(chosen, tied, machine)
        assert (reason is not None and "never trains the copy; use --fp8-backend ao" in reason) is is_refused


def test_other_precisions_have_the_keys_they_had() -> None:
    """The catalogue finds its programs by the text of a key."""
    chosen = scenario(precision="bf16", strategy="ddp")
    key = strategies.trace_key(chosen.training, chosen.strategy, DeviceKind.CUDA)
    assert key.text == "cuda/full/autocast-bf16/none/sdpa/plain/hf/bn"


def test_a_step_that_ends_in_blocks_gets_an_end() -> None:
    """As with frozen embeddings. Engines that gather for the backward refuse a stack, of several, that has none."""
    whole = program()
    assert with_an_end(whole) is whole
    cut = replace(whole, stages=whole.stages[:-1])
    assert cut.stages[-1].stack and with_an_end(cut).stages[:-1] == cut.stages
    assert with_an_end(cut).section_of(with_an_end(cut).stages[-1], 0).events == ()
    tower = replace(next(stage for stage in whole.stages if stage.stack), name="forward.tower", stack="tower")
    with pytest.raises(TraceError, match=r"tower, which is frozen with all ahead of it.*use --strategy zero3"):
        with_an_end(replace(whole, stages=(tower, *whole.stages)))
