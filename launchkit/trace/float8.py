"""torchao's linear layers as accelerate puts them in, whose products are of 8-bit copies.

Nothing of them is imitated: torchao's own autograd function runs on the fake tensors, casts, scales and padding
included, and ``torch._scaled_mm`` at its end takes no more than its output on CUDA as well: it runs in cuBLASLt's
workspace, which is cuBLAS's. Source: torchao 0.18 ``float8/float8_linear.py``, ``float8_ops.py``; accelerate 1.15
``utils/ao.py``, ``AORecipeKwargs``; pytorch ``aten/src/ATen/native/cuda/ScaledBlas.cpp`` (``_scaled_mm_cuda``) and
torch 2.13 ``torch.backends.cuda.cublaslt_workspace_size``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from launchkit.errors import MissingExtraError, TraceError
from launchkit.scenario import DeviceKind, TraceKey

_TENSOR_MODULE = "torchao.float8.float8_training_tensor"


def float8_types() -> frozenset[type]:
    """The tensor class that torchao wraps an 8-bit copy and its scale in; none where torchao was not imported."""
    module = sys.modules.get(_TENSOR_MODULE)
    return frozenset() if module is None else frozenset({module.Float8TrainingTensor})


def is_float8(tensor: torch.Tensor) -> bool:
    return type(tensor) in float8_types()


def convert_linears(model: nn.Module, key: TraceKey) -> None:
    """Puts torchao's layers in place of linear ones, in place and on the meta device, where ``key`` says so.

    As accelerate does it, the first and the last stay as they are, and so does what has a side that 16 does not
    divide. Raises ``TraceError`` where that leaves none, ``MissingExtraError`` where torchao is missing.
    """
    if not key.compute.is_float8 or key.transformer_engine:
        return
    try:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear
    except ImportError:
        raise MissingExtraError(
            "--precision fp8 is traced with torchao, which is not installed; pip install 'launchkit-planner[fp8]'"
        ) from None
    from accelerate.utils.ao import convert_model_to_fp8_ao

    convert_model_to_fp8_ao(model, config=Float8LinearConfig(pad_inner_dim=key.pads_float8))
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    if not layers:
        raise TraceError(
            f"--precision fp8 changes nothing in {type(model).__name__}: none of its linear layers but the first and "
            "the last has sides that 16 divides; use --precision bf16"
        )
    if key.gathers_float8:
        for layer in layers:
            layer.weight = _gathered(layer)


def _gathered(layer: Any) -> nn.Parameter:
    """A weight as FSDP2 hands it to the layer: cast by each rank before it was gathered.

    Source: torchao 0.18 ``fsdp_utils.py``, ``WeightWithDynamicFloat8CastTensor.fsdp_post_all_gather``.
    """
    data = torch.empty_like(layer.weight, dtype=layer.config.cast_config_weight.target_dtype)
    scale = torch.empty((), dtype=torch.float32, device=data.device)
    return nn.Parameter(_wrapped(data, scale, layer.weight.dtype, layer.linear_mm_config))


def like_float8(whole: Any, part: torch.Tensor) -> torch.Tensor:
    """``part`` as the 8-bit data of a tensor like ``whole``."""
    scale = torch.empty_like(whole._scale, device=part.device)
    return _wrapped(part, scale, whole._orig_dtype, whole._linear_mm_config)


def _wrapped(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, config: Any) -> torch.Tensor:
    from torchao.float8.float8_training_tensor import Float8TrainingTensor, GemmInputRole

    tensor: torch.Tensor = Float8TrainingTensor(data, scale, dtype, config, gemm_input_role=GemmInputRole.WEIGHT)
    return tensor


@contextmanager
def autocast_as_on_cuda(key: TraceKey) -> Iterator[None]:
    """While active, torchao's question about autocast, which it asks of CUDA, is answered for the CPU that stands for
    it: ``Float8Linear.forward`` casts its input itself."""
    if not key.compute.is_float8 or key.transformer_engine or key.device is not DeviceKind.CUDA:
        yield
        return
    is_enabled = torch.is_autocast_enabled
    with (
        mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": is_enabled(device)),
        mock.patch.object(torch, "get_autocast_gpu_dtype", lambda: torch.get_autocast_dtype("cpu")),
    ):
        yield
