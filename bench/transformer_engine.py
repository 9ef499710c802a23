"""Transformer Engine's own Python beside ``launchkit.trace.transformer_engine``, on a CPU: what it keeps, and how long.

``python -m bench.transformer_engine SOURCE`` takes a checkout of https://github.com/NVIDIA/TransformerEngine (v2.18).
Its ``Linear`` and ``LayerNorm`` run on CPU tensors with what is C++ in it replaced by functions that allocate as the
C++ does and compute nothing: ``Float8Quantizer::create_tensor``, ``bgrad_quantize``, ``gemm``, the norm's two kernels.
What is kept, dropped and made anew, and when, is then told by its own Python. Frees with no allocation between them
count as one moment; tensors below 1 KiB (scales, maxima) are left out. Exit code 1 where a list of events differs.
"""

from __future__ import annotations

import enum
import gc
import importlib
import importlib.machinery
import os
import sys
import tempfile
import types
from collections.abc import Callable
from itertools import groupby, product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launchkit.scenario import DeviceKind
from launchkit.trace import transformer_engine as ours
from launchkit.trace.recorder import AllocRecord, StepRecorder

NUM_ROWS, INNER, OUTER = 256, 64, 96
SMALLEST_BYTES = 1024
_DTYPES = ("kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1")
# What asks for a GPU in the Python that runs, by file.
_EDITS = {
    "module/base.py": (("if not inp.is_cuda:", "if False:"), ('device="cuda"', 'device="cpu"')),
    "module/linear.py": (('device: Union[torch.device, str] = "cuda"', 'device: Union[torch.device, str] = "cpu"'),),
    "quantization.py": (('torch.device("cuda")', 'torch.device("cpu")'),),
    "ops/basic/layer_norm.py": (("canonicalize_device(None)", 'torch.device("cpu")'),),
    "utils.py": (("torch.Tensor().cuda()", "torch.Tensor()"),),
}

Story = list[tuple[bool, tuple[int, ...]]]  # is it an allocation, and of which bytes


class _Anything(types.ModuleType):
    """A module that has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = mock.MagicMock()
        setattr(self, name, made)
        return made


class Theirs:
    """Transformer Engine's layers, imported from ``source``. One of these to a process."""

    def __init__(self, source: Path, scratch: Path) -> None:
        self.transposes = True
        os.environ["NVTE_TORCH_COMPILE"] = "0"
        self.tex = _Anything("transformer_engine_torch")
        self.tex.DType = enum.IntEnum("DType", _DTYPES)
        package = scratch / "transformer_engine"
        package.mkdir()
        for name in ("common", "debug"):
            (package / name).symlink_to(source.resolve() / "transformer_engine" / name)
        self._copy(source / "transformer_engine" / "pytorch", package / "pytorch")
        self._import(package)

    def _copy(self, source: Path, target: Path) -> None:
        for file in source.rglob("*.py"):
            text, name = file.read_text(), str(file.relative_to(source))
            for old, new in _EDITS.get(name, ()):
                assert old in text, f"{name} has no {old!r}: another version than 2.18?"
                text = text.replace(old, new)
            copied = target / name
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_text(text)

    def _import(self, package: Path) -> None:
        sys.modules["transformer_engine_torch"] = self.tex
        for name in ("", ".common", ".pytorch", ".pytorch.module"):
            shell = types.ModuleType(f"transformer_engine{name}")
            shell.__path__ = [str(package.joinpath(*name.split(".")))]
            shell.__spec__ = importlib.machinery.ModuleSpec(shell.__name__, None, is_package=True)
            sys.modules[shell.__name__] = shell
        kernels = ("", *(f".{file.stem}" for file in (package / "pytorch" / "triton").glob("[a-z]*.py")))
        for name in (".export", *(f".triton{kernel}" for kernel in kernels)):
            sys.modules[f"transformer_engine.pytorch{name}"] = _Anything(f"transformer_engine.pytorch{name}")
        sys.modules["transformer_engine.pytorch.triton"].__path__ = []
        sys.modules["transformer_engine.pytorch.export"].is_in_onnx_export_mode = lambda: False  # type: ignore[attr-defined]
        load = importlib.import_module
        load("transformer_engine.pytorch.tensor")
        self.linear = load("transformer_engine.pytorch.module.linear")
        self.quantization = load("transformer_engine.pytorch.quantization")
        self.norm = load("transformer_engine.pytorch.ops.basic.layer_norm")
        self.stored = load("transformer_engine.pytorch.tensor.storage.float8_tensor_storage")
        self.tensor = load("transformer_engine.pytorch.tensor.float8_tensor")
        self.recipe = load("transformer_engine.common.recipe").DelayedScaling()
        for module in [module for name, module in sys.modules.items() if name.startswith("transformer_engine")]:
            if "is_non_tn_fp8_gemm_supported" in vars(module):
                module.is_non_tn_fp8_gemm_supported = lambda: not self.transposes  # type: ignore[attr-defined]
            if "torch_get_autocast_gpu_dtype" in vars(module):
                module.torch_get_autocast_gpu_dtype = lambda: torch.get_autocast_dtype("cpu")  # type: ignore[attr-defined]
        self.tex.quantize, self.tex.bgrad_quantize = self._quantize, self._bgrad_quantize
        self.tex.generic_gemm = self._gemm
        self.norm.layernorm_fwd, self.norm.layernorm_bwd = _layernorm_fwd, _layernorm_bwd

    def _quantize(self, source: torch.Tensor, quantizer: Any, *_: Any) -> Any:
        """``Float8Quantizer::create_tensor``."""
        source = source.contiguous()
        scale = torch.empty(1, dtype=torch.float32)
        has_data = quantizer.rowwise_usage or not self.transposes
        data = torch.empty(source.shape, dtype=torch.uint8) if has_data else None
        turned = (source.shape[-1], *source.shape[:-1])
        is_transposed = quantizer.columnwise_usage and self.transposes
        transpose = torch.empty(turned, dtype=torch.uint8) if is_transposed else None
        parts = {"data": data, "fp8_scale_inv": scale, "fp8_dtype": quantizer.dtype, "data_transpose": transpose}
        if quantizer.internal:
            return self.stored.Float8TensorStorage(**parts, quantizer=quantizer, fake_dtype=source.dtype)
        return self.tensor.Float8Tensor(shape=source.shape, dtype=source.dtype, **parts, quantizer=quantizer)

    def _bgrad_quantize(self, gradient: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
        """``bias.cpp``, with the workspaces of ``cast_transpose_fusion.cu`` and ``quantize_fp8.cuh``."""
        bias = gradient.new_empty(gradient.shape[-1])
        quantised = self._quantize(gradient, quantizer)
        rows = -(-len(gradient) // (256 if self.transposes else 128))
        torch.empty(rows, gradient.shape[-1], dtype=torch.float32)
        return bias, quantised

    def _gemm(self, a: Any, is_a_turned: bool, b: Any, is_b_turned: bool, *rest: Any, **_: Any) -> tuple[Any, ...]:
        dtypes = {self.tex.DType.kFloat32: torch.float32, self.tex.DType.kBFloat16: torch.bfloat16}
        (a_rows, a_columns), (b_rows, b_columns) = _matrix(a), _matrix(b)
        shape = (b_columns if is_b_turned else b_rows, a_rows if is_a_turned else a_columns)
        return torch.empty(shape, dtype=dtypes[int(rest[2])]), None, None, None


def _matrix(tensor: Any) -> tuple[int, int]:
    if tensor._data is not None:
        return tensor._data.numel() // tensor._data.shape[-1], tensor._data.shape[-1]
    return tensor._transpose.numel() // len(tensor._transpose), len(tensor._transpose)


def _layernorm_fwd(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    moments = [torch.empty(len(x), dtype=torch.float32) for _ in range(2)]
    return (torch.empty_like(x), *moments)


def _layernorm_bwd(gradient: torch.Tensor, x: torch.Tensor, mu: Any, sigma: Any, weight: torch.Tensor, *_: Any) -> Any:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def story(model: nn.Module, x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor], *, is_kept: bool) -> Story:
    """What a steady step of ``model`` asks of the allocator, and gives back."""

    def step() -> None:
        hidden = x * 1.0
        out = run(hidden) if is_kept else checkpoint(run, hidden, use_reentrant=False)
        loss = out.float().sum()
        del out, hidden
        loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    x.grad = None
    gc.collect()
    parameters = list(model.parameters())
    recorder = StepRecorder(known=[x, *parameters, *model.buffers()], parameters=parameters, device=DeviceKind.CPU)
    gc.disable()
    with recorder:
        recorder.recording = True
        step()
        recorder.recording = False
    gc.enable()
    sizes: dict[int, int] = {}
    events = []
    for event in recorder.log.memory:
        is_alloc = isinstance(event, AllocRecord)
        if is_alloc:
            sizes[event.storage] = event.num_bytes
        if sizes.get(event.storage, 0) >= SMALLEST_BYTES:
            events.append((is_alloc, sizes[event.storage]))
    moments = ((is_alloc, [size for _, size in run]) for is_alloc, run in groupby(events, key=lambda event: event[0]))
    return [(is_alloc, tuple(sizes if is_alloc else sorted(sizes))) for is_alloc, sizes in moments]


def compare(theirs: Theirs, *, transposes: bool, bias: bool, dtype: torch.dtype, x: torch.Tensor, **how: bool) -> bool:
    """Whether a norm and two linear layers tell the same story in both."""
    theirs.transposes = transposes
    theirs.quantization.FP8GlobalStateManager.reset()
    linear = type("Linear", (ours.Linear,), {"transposes": transposes})
    own = [linear(INNER, OUTER, bias, params_dtype=dtype), linear(OUTER, INNER, bias, params_dtype=dtype)]
    other = [theirs.linear.Linear(a, b, bias=bias, params_dtype=dtype) for a, b in ((INNER, OUTER), (OUTER, INNER))]
    if how["norm"]:
        own.insert(0, ours.LayerNorm(INNER, params_dtype=dtype))
        other.insert(0, theirs.norm.LayerNorm(INNER, device="cpu", dtype=dtype))
    first, second = nn.Sequential(*other).train(), nn.Sequential(*own).to_empty(device="cpu").train()

    def run(model: nn.Module, quantises: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                if not quantises:
                    return model(hidden)  # type: ignore[no-any-return]
                with theirs.quantization.autocast(enabled=True, recipe=theirs.recipe):
                    return model(hidden)  # type: ignore[no-any-return]

        return forward

    told = story(first, x, run(first, True), is_kept=how["kept"])
    return told == story(second, x, run(second, False), is_kept=how["kept"])


def main(source: str) -> int:
    is_on, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    flags, dtypes = (True, False), ("float32", "bfloat16")
    device = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    patches = (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch.cuda, "current_device", lambda: "cpu"),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: device),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: is_on("cpu")),
        mock.patch.object(torch, "get_autocast_dtype", lambda *_: dtype_of("cpu")),
    )
    for patch in patches:
        patch.start()
    num_equal = num_cases = 0
    with tempfile.TemporaryDirectory() as scratch:
        sys.path.insert(0, scratch)
        theirs = Theirs(Path(source), Path(scratch))
        for transposes, bias, weight, hidden, norm, kept in product(flags, flags, dtypes, dtypes, flags, flags):
            x = torch.randn(4, NUM_ROWS // 4, INNER, dtype=getattr(torch, hidden), requires_grad=True)
            dtype = getattr(torch, weight)
            is_equal = compare(theirs, transposes=transposes, bias=bias, dtype=dtype, x=x, norm=norm, kept=kept)
            num_cases, num_equal = num_cases + 1, num_equal + is_equal
            if not is_equal:
                print(f"differs: {transposes=} {bias=} {weight=} {hidden=} {norm=} checkpointed={not kept}")
    print(f"{num_equal} of {num_cases} lists of events are equal")
    return 0 if num_equal == num_cases else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
