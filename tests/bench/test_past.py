"""What the code of published runs did differently, each habit by its effect on a small model's step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from bench.accuracy.past import Past, PastModel
from bench.accuracy.published import past_of
from launchkit.catalog.models import TracedModel
from launchkit.program import Owner, Phase, Point, StepProgram
from launchkit.scenario import Checkpointing, Compute, DeviceKind, Loss, TraceKey
from launchkit.simulate.memory import read_memory
from launchkit.trace import profile_model, trace_model
from tests.trace.models import LLAMA, LORA, key

pytestmark = pytest.mark.filterwarnings("ignore")
POINT = Point(2, 512, 8)
TOKENS = POINT.micro_batch * POINT.seq_len
HIDDEN_BYTES = 2 * TOKENS * LLAMA["hidden_size"]
LAYERS = LLAMA["num_hidden_layers"]
FULL = {"device": DeviceKind.CUDA, "compute": Compute.BF16, "checkpointing": Checkpointing.FULL}


@dataclass
class Source:
    """A catalogued model, as far as ``PastModel`` asks."""

    config = LLAMA
    profile = profile_model(LLAMA, name="it")


def as_it_was(past: Past, asked: TraceKey) -> StepProgram:
    return PastModel(source=cast(TracedModel, Source()), past=past).program(asked)


def peak(program: StepProgram) -> int:
    return read_memory(program, POINT).allocated_peak_bytes


def allocated(program: StepProgram, phase: Phase, owner: Owner) -> int:
    """Bytes of all that a phase allocates for ``owner``."""
    sections = [
        program.section_of(stage, layer) for stage in program.stages for layer in stage.order() if stage.phase is phase
    ]
    return sum(e.size.at(POINT) for s in sections for e in s.events if getattr(e, "owner", None) is owner)


def test_without_habits_the_step_is_todays() -> None:
    asked = key(**FULL)
    assert as_it_was(Past(), asked) == trace_model(LLAMA, asked)


def test_habits_are_named() -> None:
    assert Past(reenters=True, fused_loss=True).habits == ("reenters", "fused_loss")


def test_shifted_logits_are_copied() -> None:
    """All logits in fp32 beside a copy without the last position's."""
    asked = key(**FULL)
    logits = 4 * TOKENS * LLAMA["vocab_size"]
    grown = allocated(as_it_was(Past(shifts_logits=True), asked), Phase.LOSS, Owner.LOGITS)
    assert grown - allocated(trace_model(LLAMA, asked), Phase.LOSS, Owner.LOGITS) == pytest.approx(logits, rel=0.01)


def test_frozen_units_hold_the_inputs_of_their_recomputation_to_the_end() -> None:
    """Of each block the hidden states and their gradient outlive its backward, where there are adapters."""
    asked = key(**FULL | LORA, loss=Loss.LIGER)
    past = Past(reenters=True)
    held, let_go = (peak(as_it_was(p, asked)) for p in (Past(reenters=True, checkpoints_units=True), past))
    assert held - let_go == pytest.approx((LAYERS - 1) * HIDDEN_BYTES, rel=0.2)
    without = key(**FULL)
    assert as_it_was(Past(reenters=True, checkpoints_units=True), without) == as_it_was(past, without)


def test_outputs_of_the_batch_before_are_held() -> None:
    asked = key(**FULL)
    logits = 4 * TOKENS * LLAMA["vocab_size"]
    kept, left = (
        peak(as_it_was(Past(shifts_logits=True, widens_logits=True, keeps_outputs=k), asked)) for k in (True, False)
    )
    assert logits <= kept - left <= 2 * logits


FMS = {"source_group": "fms-acceleration", "model": "mistralai/Mistral-7B-v0.1", "loss_impl": "HF eager (fp32 logits)"}


@pytest.mark.parametrize(
    ("fields", "habits"),
    [
        ({"source_group": "litgpt"}, set()),
        ({"source_group": "ZeRO gist"}, {"reenters", "shifts_logits", "widens_logits", "keeps_outputs"}),
        (
            {"framework": "transformers 4.48.1", "raw": "framework_config=none.", "strategy": "single"},
            {"reenters", "shifts_logits"},
        ),
        (
            {
                "framework": "transformers 4.45.2",
                "raw": "framework_config=foak-fast-kernels.",
                "strategy": "fsdp_full_shard",
            },
            {
                "reenters",
                "shifts_logits",
                "widens_logits",
                "fused_loss",
                "repeats_keys",
                "fast_kernels",
                "checkpoints_units",
            },
        ),
        (
            {"framework": "transformers 4.48.1", "raw": "framework_config=baseline-peft-bnb.", "strategy": "single"},
            {"reenters", "shifts_logits", "widens_norms_alone"},
        ),
        (
            {
                "framework": "transformers 4.48.1",
                "raw": "framework_config=accelerated-peft-bnb.",
                "strategy": "fsdp_full_shard",
            },
            {"reenters", "shifts_logits", "keeps_half", "checkpoints_units", "brings_units"},
        ),
    ],
)
def test_habits_of_a_source(fields: dict[str, Any], habits: set[str]) -> None:
    assert set(past_of(FMS | fields).habits) == habits
