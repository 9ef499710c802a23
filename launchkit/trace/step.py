"""Runs a step of a built model on fake tensors at one point and returns its log, place by place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from launchkit.images import OF_ANY_SIZE
from launchkit.program import Point
from launchkit.scenario import Compute, TraceKey
from launchkit.trace.build import Built
from launchkit.trace.checkpointing import host_apart
from launchkit.trace.compat import full_sequences, random_states
from launchkit.trace.float8 import is_float8
from launchkit.trace.inputs import make_batch
from launchkit.trace.methods import unpacking_for_dora
from launchkit.trace.parallel import RankRecorder, local
from launchkit.trace.recorder import Log, Place, StepRecorder
from launchkit.trace.values import known_numbers

_AUTOCAST = {
    Compute.AUTOCAST_BF16: torch.bfloat16,
    Compute.BF16_AUTOCAST: torch.bfloat16,
    Compute.AUTOCAST_FP16: torch.float16,
    Compute.FP16_AUTOCAST: torch.float16,
    Compute.AUTOCAST_FP8: torch.bfloat16,
    Compute.FP8_AUTOCAST: torch.bfloat16,
}

Forward = Callable[[nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]


class Progress:
    """Where the step has got to: set by hooks on the blocks going forward, by gradients coming back."""

    def __init__(self, recorder: StepRecorder, built: Built) -> None:
        self.recorder = recorder
        self.built = built
        self.handles: list[Any] = []
        self.gap = 0
        for stack in built.stacks:
            blocks = built.blocks(stack)
            for layer, block in enumerate(blocks):
                last = layer == len(blocks) - 1
                self.handles.append(
                    block.register_forward_pre_hook(self._entering(stack.path, layer), with_kwargs=True)
                )
                self.handles.append(block.register_forward_hook(self._leaving(stack.path, layer, last)))

    def begin(self) -> None:
        self.gap = 0
        self.recorder.place = Place("forward.0", 0)

    def begin_backward(self) -> None:
        self.recorder.place = Place(f"backward.{self.gap}", 0)

    def _entering(self, path: str, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer == 0:
                tensor = _first_tensor((*args, *kwargs.values()))
                if tensor is not None and tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                    tensor.register_hook(self._arriving(Place(f"backward.{self.gap}", 0)))
            self.recorder.place = Place(f"forward.{path}", layer)

        return hook

    def _leaving(self, path: str, layer: int, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensor = _first_tensor(output if isinstance(output, tuple) else (output,))
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(self._arriving(Place(f"backward.{path}", layer)))
            if last:
                self.gap += 1
                self.recorder.place = Place(f"forward.{self.gap}", 0)

        return hook

    def _arriving(self, place: Place) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            self.recorder.place = place

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _first_tensor(values: tuple[Any, ...]) -> torch.Tensor | None:
    return next((v for v in values if isinstance(v, torch.Tensor)), None)


def trace_step(built: Built, mode: FakeTensorMode, *, point: Point, key: TraceKey, forward: Forward) -> Log:
    """The log of one step, or of one batch's evaluation. Gradients are ``None`` before it, as after
    ``zero_grad(set_to_none=True)``."""
    model = built.model.train(not key.evaluation)
    parameters = dict(model.named_parameters())
    with (
        mode,
        known_numbers(mode) if key.images and built.config.model_type in OF_ANY_SIZE else nullcontext(),
        full_sequences(packed=key.packed, padded=key.padded),
        random_states(key.device),
        host_apart(key.device),
        unpacking_for_dora(),
    ):
        batch = make_batch(built, point, key)
        weights = [local(parameter) for parameter in parameters.values()]
        scales = [parameter._scale for parameter in parameters.values() if is_float8(parameter)]  # type: ignore[attr-defined]
        known = [*weights, *scales, *model.buffers(), *batch.values()]
        recorder = _recorder(key, known=known, parameters=weights)
        progress = Progress(recorder, built)
        try:
            with recorder:
                progress.begin()
                with _collected():
                    recorder.recording = True
                    _one_step(model, batch, key=key, forward=forward, progress=progress)
                    _note_gradients(recorder, parameters)
                    recorder.place = Place("end", 0)
                    model.zero_grad(set_to_none=True)
                recorder.recording = False
        finally:
            progress.remove()
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in batch.values()}
        recorder.log.inputs = list(storages.values())
    return recorder.log


def _recorder(key: TraceKey, **tensors: Any) -> StepRecorder:
    if key.split.num_ranks > 1:
        return RankRecorder(key=key, **tensors)
    return StepRecorder(**tensors, device=key.device, asks_kernels=key.asks_kernels, attention=key.attention)


def _one_step(
    model: nn.Module, batch: Mapping[str, torch.Tensor], *, key: TraceKey, forward: Forward, progress: Progress
) -> None:
    with ExitStack() as stack:
        if key.evaluation:
            stack.enter_context(torch.no_grad())
        if key.compute in _AUTOCAST:
            stack.enter_context(torch.autocast("cpu", dtype=_AUTOCAST[key.compute]))
        loss = forward(model, batch)
    if not key.evaluation:
        progress.begin_backward()
        loss.backward()


def _note_gradients(recorder: StepRecorder, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            gradient, weight = local(parameter.grad), local(parameter)
            recorder.log.gradients[recorder.number(gradient)] = name
            if gradient.numel() > weight.numel():
                recorder.log.wide_gradients[name] = gradient.numel()


@contextmanager
def _collected() -> Iterator[None]:
    """No garbage left after, and no collection at a moment of the interpreter's choosing before.

    What lives already is frozen out of the collector's sight: a collection would spend a tenth of a second on
    transformers' modules alone.
    """
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        gc.enable()
