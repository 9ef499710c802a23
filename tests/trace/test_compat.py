"""A batch of full sequences gets no mask, in a trace as outside of one."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from launchkit.scenario import Attention
from launchkit.trace import trace_model
from launchkit.trace.compat import full_sequences
from tests.trace.models import LLAMA, allocations, key

pytestmark = pytest.mark.filterwarnings("ignore")


def test_full_sequences_are_not_taken_for_packed_ones() -> None:
    positions = torch.arange(8).repeat(2, 1)
    original = masking_utils.find_packed_sequence_indices
    with full_sequences():
        assert masking_utils.find_packed_sequence_indices(positions) is None
        assert not masking_utils.is_tracing(positions)
    assert masking_utils.find_packed_sequence_indices is original


@pytest.mark.parametrize(("attention", "quadratic"), [(Attention.SDPA, False), (Attention.EAGER, True)])
def test_only_eager_attention_is_quadratic_in_length(attention: Attention, quadratic: bool) -> None:
    program = trace_model(LLAMA, key(attention=attention))
    sizes = [a.size for section in program.sections for a in allocations(section)]
    assert any(term.seq_len == 2 for size in sizes for term in size.terms) is quadratic
