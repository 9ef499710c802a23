"""What operators cost beyond their outputs: FLOPs that torch's own registry lacks, and scratch memory that a
kernel takes and returns inside one call, which no dispatch mode can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas by overload packet, called as torch's are: the operator's arguments and ``out_val``."""
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_flash_backward_flops,
    }


def _cpu_flash_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _cpu_flash_backward_flops(
    grad_out: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape))


def scratch_bytes(name: str, inputs: list[torch.Tensor]) -> int:
    """Bytes that the kernel ``name`` holds only while it runs; 0 for all but a few."""
    rule = _SCRATCH.get(name)
    return rule(inputs) if rule else 0


_SCRATCH: dict[str, Callable[[list[torch.Tensor]], int]] = {}
