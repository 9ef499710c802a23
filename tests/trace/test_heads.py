"""Fused heads hold what the functions that they stand for hold."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from launchkit.errors import TraceError
from launchkit.program import Owner, Point, StepProgram, Tiles
from launchkit.scenario import Compute, DeviceKind, Loss, Method, TraceKey, Trainer
from launchkit.simulate.memory import MemoryReading, read_memory
from launchkit.trace import trace_model
from launchkit.trace.forward import forward_of
from launchkit.trace.heads import ChunkedLogProb
from launchkit.trace.recorder import AllocRecord, Log, StepRecorder
from tests.trace.models import LLAMA, allocations, first_section, key, varied

pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 40_000  # two of TRL's tiles
WIDE = varied(LLAMA, vocab_size=VOCABULARY, tie_word_embeddings=True)
CUDA: dict[str, Any] = {"device": DeviceKind.CUDA, "compute": Compute.BF16}


def logged(run: Callable[[], Any]) -> Log:
    """The log of ``run`` and of the backward pass from the first tensor that it returns."""
    recorder = StepRecorder(known=(), parameters=())
    with recorder:
        recorder.recording = True
        outputs = run()
        outputs[0].sum().backward()
    return recorder.log


def peak(log: Log) -> int:
    sizes = {record.storage: record.num_bytes for record in log.memory if isinstance(record, AllocRecord)}
    deltas = (sizes[r.storage] if isinstance(r, AllocRecord) else -sizes.get(r.storage, 0) for r in log.memory)
    return max(accumulate(deltas))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trains_head", [True, False], ids=["head", "frozen head"])
def test_the_chunked_loss_holds_what_trl_holds(dtype: torch.dtype, trains_head: bool) -> None:
    kernels = pytest.importorskip("trl.kernels.chunked_logprob")
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(96, 64, dtype=dtype, requires_grad=True)
        weight = torch.empty(VOCABULARY, 64, dtype=dtype, requires_grad=trains_head)
        targets = torch.zeros(96, dtype=torch.int64)
        function = kernels.ChunkedLogProbFunction
        outputs = ("log_probs", "entropy", "is_top1")
        real = logged(lambda: function.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs))
        hidden.grad = weight.grad = None
        ours = logged(lambda: ChunkedLogProb.apply(hidden, weight, None, targets, False))
    assert peak(ours) == pytest.approx(peak(real), abs=256)  # constants of a module that the first call imports


def reading(program: StepProgram, batch: int, length: int) -> MemoryReading:
    return read_memory(program, Point(batch, length))


def test_a_tile_of_trl_stops_growing_at_4096_rows() -> None:
    program = trace_model(WIDE, key(**CUDA, trainer=Trainer.TRL, loss=Loss.CHUNKED))
    assert reading(program, 2, 513).at_peak[Owner.LOGITS] == 2 * 512 * 32768 * 2
    for batch, length in ((8, 513), (8, 4096)):
        assert reading(program, batch, length).at_peak[Owner.LOGITS] == 4096 * 32768 * 2


@pytest.mark.parametrize(
    ("rows", "vocab_size", "hidden_size", "chunk"),
    [
        (16384, 32000, 4096, 2048),  # the example in liger's own comment
        (16384, 128256, 4096, 512),
        (100, 128256, 64, 1),
        (3, 64, 64, 3),  # never more than there are
        (5, 64, 32, 4),
    ],
)
def test_chunks_of_liger(rows: int, vocab_size: int, hidden_size: int, chunk: int) -> None:
    assert Tiles(1, parts=-(-vocab_size // hidden_size)).rows(rows) == chunk


def test_tiles_of_trl() -> None:
    assert [Tiles(3, most=4096).rows(rows) for rows in (1, 4096, 4097, 10**6)] == [1, 4096, 4096, 4096]


@pytest.mark.parametrize("loss", [Loss.LIGER, Loss.CCE])
def test_a_fused_head_writes_fewer_logits(loss: Loss) -> None:
    plain, fused = (trace_model(WIDE, key(**CUDA, loss=each)) for each in (Loss.PLAIN, loss))
    whole = reading(plain, 4, 1024).at_peak[Owner.LOGITS]
    assert whole >= 4 * 1024 * VOCABULARY * (2 + 4)
    assert reading(fused, 4, 1024).at_peak[Owner.LOGITS] < whole / 100


@pytest.mark.parametrize("trainer", [Trainer.LOOP, Trainer.AXOLOTL])
def test_liger_keeps_the_gradient_of_the_head_through_the_backward(trainer: Trainer) -> None:
    """It is made in the forward pass; the strategies still find it where gradients arrive."""
    program = trace_model(varied(WIDE, tie_word_embeddings=False), key(**CUDA, loss=Loss.LIGER, trainer=trainer))
    head = VOCABULARY * 32 * 2
    forward, backward = first_section(program, "forward.1"), first_section(program, "backward.1")
    assert head in {event.size.at(Point(2, 64)) for event in allocations(forward)}
    assert [event.size.at(Point(2, 64)) for event in backward.gradients][:1] == [head]


def test_a_frozen_head_has_no_gradient() -> None:
    adapters = key(**CUDA, loss=Loss.LIGER, method=Method.LORA, lora_targets="all-linear")
    program = trace_model(varied(WIDE, tie_word_embeddings=False), adapters)
    sizes = {event.size.at(Point(2, 64, 8)) for event in allocations(first_section(program, "forward.1"))}
    assert VOCABULARY * 32 * 2 not in sizes


def test_a_block_under_liger_keeps_this_much_of_a_token() -> None:
    """bf16: two norms with their inverse in fp32, queries, keys and values as they were projected, attention and its
    log-sum-exp, gate, up and their product, and the residual stream twice."""
    program = trace_model(LLAMA, key(**CUDA, loss=Loss.LIGER))
    section = first_section(program, "forward.model.layers", layer=2)
    kept = {event.slot: event.size.at(Point(2, 64)) for event in allocations(section)}
    for event in section.events:
        if getattr(event, "ref", None) and event.ref.stage == "forward.model.layers" and event.ref.layer == 0:
            kept.pop(event.ref.slot, None)
    hidden, inner, keys, heads = 32, 48, 16, 4
    expected = 2 * (2 * hidden + 4) + 2 * (hidden + 2 * keys) + 2 * hidden + 4 * heads + 3 * 2 * inner + 2 * 2 * hidden
    assert sum(kept.values()) // (2 * 64) == expected


@pytest.mark.parametrize("compute", [Compute.FP32, Compute.BF16, Compute.AUTOCAST_BF16, Compute.BF16_AUTOCAST])
@pytest.mark.parametrize(
    "head",
    [
        {"trainer": Trainer.TRL, "loss": Loss.CHUNKED},
        {"trainer": Trainer.TRL, "loss": Loss.LIGER},
        {"loss": Loss.LIGER},
        {"loss": Loss.CCE},
    ],
    ids=str,
)
def test_the_head_is_computed_three_times_over(head: dict[str, Any], compute: Compute) -> None:
    """Logits and two gradients, and once more the logits where the backward makes them again."""
    program = trace_model(LLAMA, key(device=DeviceKind.CUDA, compute=compute, **head))
    point = Point(8, 1024)
    stages = (first_section(program, name) for name in ("forward.1", "backward.1"))
    flops = sum(kernel.count * kernel.flops.at(point) for section in stages for kernel in section.kernels)
    rows = 8 * (1023 if head.get("trainer") is Trainer.TRL else 1024)
    products = 3 if head == {"loss": Loss.LIGER} else 4
    assert flops == products * 2 * rows * 32 * 96


def test_liger_refuses_what_it_is_not_known_to_patch() -> None:
    with pytest.raises(TraceError, match="Liger's kernels for gpt2 are not modelled"):
        trace_model({"model_type": "gpt2", "n_embd": 32, "n_layer": 5, "n_head": 4}, key(**CUDA, loss=Loss.LIGER))


def test_a_loss_that_a_trainer_does_not_have() -> None:
    asked: TraceKey = key(loss=Loss.CHUNKED, trainer=Trainer.HF)
    with pytest.raises(TraceError, match="no chunked loss is known of the hf trainer"):
        forward_of(asked)
