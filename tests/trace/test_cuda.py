"""A trace for CUDA keeps what CUDA keeps: dtypes under autocast, attention kernels, dropout masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from launchkit.scenario import Compute, DeviceKind
from launchkit.trace import trace_model
from launchkit.trace.cuda import faithful_to_cuda
from launchkit.trace.recorder import AllocRecord, StepRecorder
from tests.trace.models import GPT2, LLAMA, allocations, first_section, key, varied

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, HEADS, LENGTH, HEAD = 2, 4, 64, 16
SQUARE = BATCH * HEADS * LENGTH * LENGTH
LOG_SUM_EXP = BATCH * HEADS * LENGTH * 4


@pytest.mark.parametrize(
    ("operator", "on_cpu", "on_cuda"),
    [
        (lambda x: functional.softmax(x, dim=-1), torch.bfloat16, torch.float32),
        (lambda x: functional.layer_norm(x, (8,)), torch.bfloat16, torch.float32),
        (lambda x: x.pow(2), torch.bfloat16, torch.float32),
        (lambda x: x.sum(), torch.bfloat16, torch.float32),
        (lambda x: functional.silu(x), torch.bfloat16, torch.bfloat16),
        (lambda x: x @ x.t(), torch.bfloat16, torch.bfloat16),
    ],
    ids=["softmax", "layer_norm", "pow", "sum", "silu", "matmul"],
)
def test_autocast_widens_what_cuda_widens(
    operator: Callable[[torch.Tensor], torch.Tensor], on_cpu: torch.dtype, on_cuda: torch.dtype
) -> None:
    x = torch.ones(8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with faithful_to_cuda():
            assert operator(x).dtype is on_cuda
        assert operator(x).dtype is on_cpu


def test_without_autocast_nothing_is_widened() -> None:
    with faithful_to_cuda():
        assert functional.softmax(torch.ones(8, dtype=torch.bfloat16), dim=-1).dtype is torch.bfloat16


def test_matrix_products_of_fp32_weights_are_narrowed() -> None:
    with faithful_to_cuda(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.linear(torch.ones(2, 8), torch.ones(4, 8)).dtype is torch.bfloat16


def attention_bytes(*, dtype: torch.dtype = torch.bfloat16, mask: bool = False, head: int = HEAD) -> list[int]:
    """What one call of attention allocates, in order."""
    with FakeTensorMode(), faithful_to_cuda():
        query, key, value = (torch.empty(BATCH, HEADS, LENGTH, head, dtype=dtype) for _ in range(3))
        bias = torch.empty(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool) if mask else None
        with StepRecorder(known=[query, key, value], parameters=()) as recorder:
            recorder.recording = True
            functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=not mask)
            recorder.recording = False
    return [record.num_bytes for record in recorder.log.memory if isinstance(record, AllocRecord)]


def test_flash_keeps_the_log_sum_exp_and_no_square() -> None:
    sizes = attention_bytes()
    assert sizes.count(LOG_SUM_EXP) == 1
    assert BATCH * HEADS * LENGTH * HEAD * 2 in sizes
    assert max(sizes) < SQUARE


def test_a_mask_becomes_a_square_bias_of_the_memory_efficient_kernel() -> None:
    """Once for all heads, in the query's dtype; the square per head never exists."""
    sizes = attention_bytes(mask=True)
    assert BATCH * LENGTH * LENGTH * 2 in sizes
    assert SQUARE * 2 not in sizes
    assert LOG_SUM_EXP in sizes


def test_fp32_is_not_for_flash_and_odd_heads_of_fp32_are_for_no_kernel() -> None:
    assert LOG_SUM_EXP in attention_bytes(dtype=torch.float32)
    assert SQUARE * 4 in attention_bytes(dtype=torch.float32, head=15)
    assert LOG_SUM_EXP in attention_bytes(head=15)  # 16-bit heads are padded instead


@pytest.mark.parametrize(("on_cuda", "mask_bytes_per_element"), [(True, 1), (False, 4)])
def test_dropouts_mask_is_a_byte_per_element_on_cuda(on_cuda: bool, mask_bytes_per_element: int) -> None:
    device = DeviceKind.CUDA if on_cuda else DeviceKind.CPU
    with_dropout, without = (
        trace_model(varied(GPT2, resid_pdrop=p, embd_pdrop=0.0, attn_pdrop=0.0), key(device=device)) for p in (0.1, 0.0)
    )

    def per_token(program_index: int) -> list[int]:
        section = first_section((with_dropout, without)[program_index], "forward.transformer.h", layer=1)
        sizes = [a.size.terms for a in allocations(section)]
        return sorted(terms[0].coefficient for terms in sizes if len(terms) == 1 and terms[0][1:] == (1, 1, 0))

    added = list(per_token(0))
    for size in per_token(1):
        added.remove(size)
    assert added.count(32 * mask_bytes_per_element) >= 2  # after attention and after the MLP, 32 wide
    assert set(added) <= {32 * mask_bytes_per_element, 32 * 4}


def test_a_traced_step_for_cuda_has_no_square_where_the_cpus_has_none() -> None:
    cuda = trace_model(LLAMA, key(device=DeviceKind.CUDA, compute=Compute.AUTOCAST_BF16))
    block = allocations(first_section(cuda, "forward.model.layers", layer=1))
    assert not any(term.seq_len == 2 for a in block for term in a.size.terms)
    assert any(a.size.terms[0] == (4 * 4, 1, 1, 0) for a in block)  # the log-sum-exp of four heads
