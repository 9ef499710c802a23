"""FlashAttention 3 refuses other heads than FlashAttention 2, and accumulates in other tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from launchkit.errors import TraceError
from launchkit.program import Point
from launchkit.scenario import Attention, Compute, DeviceKind
from launchkit.trace import trace_model
from launchkit.trace.cuda import faithful_to_cuda
from launchkit.trace.flash_attention_3 import Blocks, backward_scratch, blocks_of
from launchkit.trace.recorder import AllocRecord, StepRecorder
from tests.trace.models import LLAMA, key, requests, varied

pytestmark = pytest.mark.filterwarnings("ignore")

FLASH_3 = Attention.FLASH_ATTENTION_3
BATCH, HEADS, LENGTH = 2, 4, 200


@pytest.mark.parametrize(
    ("head", "is_causal", "blocks"),
    [
        (40, True, Blocks(128, 128, 64)),
        (64, False, Blocks(128, 128, 64)),
        (80, True, Blocks(64, 128, 96)),
        (128, True, Blocks(64, 128, 128)),
        (128, False, Blocks(80, 128, 128)),
        (192, True, Blocks(64, 96, 192)),
        (256, False, Blocks(64, 80, 256)),
    ],
)
def test_heads_and_lengths_are_rounded_up_to_blocks(head: int, is_causal: bool, blocks: Blocks) -> None:
    assert blocks_of(head, is_causal=is_causal) == blocks


def tensor(heads: int, head: int) -> torch.Tensor:
    return torch.empty(BATCH, heads, LENGTH, head, dtype=torch.bfloat16, device="meta")


def test_the_backward_holds_rows_and_gradients_in_fp32() -> None:
    """200 queries are 4 blocks of 64 of a causal head of 128, 200 keys are 2 blocks of 128."""
    (held,) = backward_scratch(tensor(HEADS, 128), tensor(HEADS, 128), is_causal=True)
    rows = BATCH * HEADS * 256 * 4
    assert held == (rows, rows, rows * 128, BATCH * HEADS * 4 * 4)


def test_grouped_keys_and_values_have_gradients_in_fp32_of_their_own_heads() -> None:
    (held,) = backward_scratch(tensor(HEADS, 80), tensor(1, 80), is_causal=False)
    assert held[3:5] == (BATCH * 1 * 256 * 96 * 4,) * 2
    assert len(held) == 6


def attended(head: int, *, value_head: int = 0, attention: Attention = FLASH_3, **options: Any) -> Sequence[int]:
    """Bytes that attention and its backward allocate, in order."""
    with FakeTensorMode(), faithful_to_cuda(attention):
        query, value = (torch.empty(BATCH, HEADS, LENGTH, n, dtype=torch.bfloat16) for n in (head, value_head or head))
        query.requires_grad_()
        with StepRecorder(known=[query, value], parameters=(), attention=attention) as recorder:
            recorder.recording = True
            out = functional.scaled_dot_product_attention(query, query, value, **options)
            assert out.shape == value.shape
            out.backward(torch.empty_like(out))
            recorder.recording = False
    return [record.num_bytes for record in recorder.log.memory if isinstance(record, AllocRecord)]


def test_a_step_holds_this_scratch_and_not_flash_attention_2s() -> None:
    rows = BATCH * HEADS * LENGTH * 4
    of_2, of_3 = (attended(128, attention=a, is_causal=True) for a in (Attention.SDPA, FLASH_3))
    assert rows * 128 in of_2 and rows * 128 not in of_3
    assert of_3.count(BATCH * HEADS * 256 * 4) == 2
    assert of_3.count(rows) == of_2.count(rows) - 1  # the log-sum-exp alone


def test_no_mask_is_read_and_narrow_values_are_padded() -> None:
    square = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    assert max(attended(64, attn_mask=square)) < BATCH * HEADS * LENGTH * LENGTH * 2
    padded = BATCH * HEADS * LENGTH * 192 * 2
    assert attended(192, value_head=128).count(padded) > attended(128).count(padded)


@pytest.mark.parametrize("head", [20, 264])
def test_heads_that_it_refuses_are_told(head: int) -> None:
    with pytest.raises(
        TraceError, match=f"heads of up to 256 .* multiples of 8, .* some of {head}; use --attention sdpa"
    ):
        attended(head)


def test_padded_sequences_are_copied_without_their_padding() -> None:
    usual = key(device=DeviceKind.CUDA, compute=Compute.BF16, attention=FLASH_3)
    point, head = Point(2, 128, 0), LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
    rows = 2 * point.micro_batch * point.seq_len * LLAMA["num_attention_heads"] * head
    copies = [requests(trace_model(LLAMA, each), point).count(rows) for each in (usual, replace(usual, padded=True))]
    assert copies[1] >= copies[0] + 2 * LLAMA["num_hidden_layers"]  # of queries and of the output


def test_a_model_is_traced_in_whole_blocks() -> None:
    """The program of any length asks for what the rule says of it."""
    config = varied(LLAMA, head_dim=96, hidden_size=48, num_attention_heads=6)
    program, other = (
        trace_model(config, key(device=DeviceKind.CUDA, compute=Compute.BF16, attention=attention))
        for attention in (FLASH_3, Attention.SDPA)
    )
    point = Point(3, 1024, 0)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    query, keys = (torch.empty(3, n, 1024, 96, device="meta") for n in (heads, key_heads))
    (held,) = backward_scratch(query, keys, is_causal=True)
    asked, before = requests(program, point), requests(other, point)
    for size in held[3:5]:  # of grouped keys and values, which FlashAttention 2 has in another form
        assert asked.count(size) > before.count(size)
    assert set(held) <= set(asked)
