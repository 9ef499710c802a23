"""What each kind of checkpointing keeps between forward and backward."""

from __future__ import annotations

import pytest

from launchkit.planner.host import offloaded_activation_bytes
from launchkit.program import Alloc, Copy, Moment, Owner, Point, Size, StepProgram, Term
from launchkit.scenario import Attention, Checkpointing, Compute, DeviceKind
from launchkit.trace import trace_model
from tests.trace.models import LLAMA, first_section, key

pytestmark = pytest.mark.filterwarnings("ignore")
POINT = Point(2, 128)
HIDDEN_BYTES = 2 * 2 * 128 * 32  # bf16, batch, length, hidden size
LAYERS = LLAMA["num_hidden_layers"]


def program(checkpointing: Checkpointing, *, attention: Attention = Attention.SDPA) -> StepProgram:
    return trace_model(
        LLAMA, key(checkpointing=checkpointing, device=DeviceKind.CUDA, compute=Compute.BF16, attention=attention)
    )


def kept_bytes(traced: StepProgram) -> int:
    """Bytes that the third block's forward leaves behind."""
    section = first_section(traced, "forward.model.layers", layer=2)
    return sum(event.size.at(POINT) for event in section.events if getattr(event, "owner", None) is Owner.ACTIVATIONS)


def test_full_keeps_what_a_block_hands_on() -> None:
    assert kept_bytes(program(Checkpointing.FULL)) == HIDDEN_BYTES


def test_reentrant_keeps_as_much_and_computes_all_of_a_block_again() -> None:
    """Without re-entering, computing again stops where the last saved tensor is there, before the block's output."""
    traced, full = (program(c) for c in (Checkpointing.REENTRANT, Checkpointing.FULL))
    assert kept_bytes(traced) == HIDDEN_BYTES
    assert num_hidden_made(traced) >= num_hidden_made(full) + 2  # the last product and the residual's sum


def num_hidden_made(traced: StepProgram) -> int:
    """Tensors of the size of hidden states that the third block's backward makes."""
    events = first_section(traced, "backward.model.layers", layer=2).events
    return [event.size.at(POINT) for event in events if isinstance(event, Alloc)].count(HIDDEN_BYTES)


def test_selective_keeps_the_attention_besides() -> None:
    """Its output and, of each query, the fp32 log-sum-exp; the dropout's seeds too, of 8 bytes each."""
    log_sum_exp = 4 * 2 * 4 * 128
    assert kept_bytes(program(Checkpointing.SELECTIVE)) == pytest.approx(2 * HIDDEN_BYTES + log_sum_exp, abs=24)


def test_selective_is_full_where_no_kernel_is_known() -> None:
    selective, full = (program(c, attention=Attention.EAGER) for c in (Checkpointing.SELECTIVE, Checkpointing.FULL))
    assert kept_bytes(selective) == kept_bytes(full)


def test_offload_leaves_the_inputs_of_blocks_on_the_host() -> None:
    traced = program(Checkpointing.OFFLOAD)
    size = Size((Term(64, 1, 1),))
    forward, backward = (first_section(traced, f"{phase}.model.layers", layer=2) for phase in ("forward", "backward"))
    assert forward.copies == (Copy(False, size, Moment.BLOCKING),)
    assert Copy(True, size, Moment.BLOCKING) in (
        *backward.copies,
        *first_section(traced, "backward.model.layers", layer=3).copies,
    )
    assert offloaded_activation_bytes(traced, POINT) == LAYERS * HIDDEN_BYTES
    assert offloaded_activation_bytes(program(Checkpointing.FULL), POINT) == 0
