"""Transformer Engine's layers in a trace: which are converted, what they keep and drop, and what is refused."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from launchkit.errors import TraceError
from launchkit.program import Owner, Point, Section, StepProgram
from launchkit.scenario import Checkpointing, Compute, DeviceKind
from launchkit.trace import trace_model
from launchkit.trace.recorder import AllocRecord, StepRecorder
from launchkit.trace.transformer_engine import LayerNorm, Linear
from tests.trace.models import BERT, GPT2, LLAMA, TIED, allocations, first_section, key, varied

pytestmark = pytest.mark.filterwarnings("ignore")

MIB = 2**20
SHALLOW = varied(LLAMA, num_hidden_layers=3)
NUM_LINEARS = 7  # of a block: four of the attention, three of the MLP
TE = {
    "device": DeviceKind.CUDA,
    "compute": Compute.AUTOCAST_FP8,
    "single_sequence": True,
    "transformer_engine": True,
    "transposes_float8": True,
}


@cache
def traced(**overrides: Any) -> StepProgram:
    return trace_model(SHALLOW, key(**TE | overrides))


def num_products(section: Section) -> int:
    return sum(kernel.count for kernel in section.kernels if kernel.float8)


def kept_bytes(program: StepProgram, point: Point) -> int:
    section = first_section(program, "forward.model.layers", layer=1)
    return sum(a.size.at(point) for a in allocations(section) if a.owner is Owner.ACTIVATIONS)


@pytest.mark.parametrize(
    ("stage", "layer", "expected"),
    [
        ("forward.0", 0, 0),
        ("forward.model.layers", 0, NUM_LINEARS),
        ("forward.model.layers", 1, NUM_LINEARS),
        ("forward.1", 0, 1),  # the head too
        ("backward.model.layers", 1, 2 * NUM_LINEARS),
        ("backward.1", 0, 2),
    ],
)
def test_every_linear_layer_multiplies_in_8_bits(stage: str, layer: int, expected: int) -> None:
    assert num_products(first_section(traced(), stage, layer=layer)) == expected


def test_a_module_keeps_what_stands_behind_a_layer_with_a_side_that_16_does_not_divide() -> None:
    """accelerate leaves the module at the first of them: here the MLP, whose three all have it."""
    program = trace_model(varied(SHALLOW, intermediate_size=40), key(**TE))
    assert num_products(first_section(program, "forward.model.layers", layer=1)) == NUM_LINEARS - 3


def test_an_8_bit_product_counts_as_many_flops_as_one_of_16_bits() -> None:
    point = Point(1, 64, 0)
    plain = trace_model(SHALLOW, key(device=DeviceKind.CUDA, compute=Compute.AUTOCAST_BF16, single_sequence=True))
    for stage in ("forward.model.layers", "backward.model.layers"):
        sections = [first_section(program, stage, layer=1) for program in (traced(), plain)]
        flops = [sum(k.count * k.flops.at(point) for k in section.kernels) for section in sections]
        assert flops[0] == flops[1]


def test_a_gpu_of_one_layout_keeps_each_weight_twice() -> None:
    """Rows as they are for the forward product, transposed for the backward one; the input only once on either."""
    point = Point(1, 64, 0)
    weights = sum(p.numel(0) for p in traced().groups["LlamaDecoderLayer"].parameters if p.name.endswith("proj.weight"))
    both, once = (kept_bytes(traced(transposes_float8=transposes), point) for transposes in (True, False))
    assert both - once == weights


def test_recomputed_blocks_keep_no_8_bit_copies() -> None:
    section = first_section(traced(checkpointing=Checkpointing.FULL), "forward.model.layers", layer=1)
    narrow = [a for a in allocations(section) if a.owner is Owner.ACTIVATIONS]
    assert [a.size.at(Point(1, 64, 0)) for a in narrow] == [64 * 32 * 4]


def test_more_tokens_never_take_less() -> None:
    for program in (traced(), traced(transposes_float8=False)):
        levels = [kept_bytes(program, Point(1, tokens, 0)) for tokens in (32, 64, 256, 4096, 131072)]
        assert levels == sorted(levels)


def test_an_evaluation_multiplies_in_16_bits() -> None:
    """accelerate turns 8 bits on for training alone (``use_autocast_during_eval`` is off)."""
    assert num_products(first_section(traced(evaluation=True), "forward.model.layers", layer=1)) == 0


def test_scales_and_their_history_stay() -> None:
    """20 bytes × 1024 and two scales of five tensors, of 3 blocks of 7 layers and the head."""
    history = {n * 1024 * 4 for n in (3, 2)}
    found = [p.size.at(Point(1, 1, 0)) * p.count for p in traced().persistent if p.owner is Owner.WEIGHTS]
    assert sum(size for size in found if size in history) == 20 * 1024 * (3 * NUM_LINEARS + 1)


def test_a_layer_takes_what_transformer_engines_documentation_measured() -> None:
    """6.02 MB after the forward pass: weight 2 MB, its 8-bit copy 1, the 8-bit input 1, the output 2, and what is kept
    of scales. Source: Transformer Engine 2.18 ``docs/features/low_precision_training/performance_considerations``,
    ``memory_usage_2_pytorch.py`` and ``.out``, on a GPU; its input has no gradient, so that no transpose is kept."""
    layer = Linear(1024, 1024, params_dtype=torch.bfloat16).to_empty(device="cpu")
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    x = torch.randn(1024, 1024, dtype=torch.bfloat16)
    recorder = StepRecorder(known=[x, *layer.parameters(), *layer.buffers()], parameters=[], device=DeviceKind.CPU)
    with recorder:
        recorder.recording = True
        out = layer(x)
        recorder.recording = False
    freed = {event.storage for event in recorder.log.memory if not isinstance(event, AllocRecord)}
    kept = [e.num_bytes for e in recorder.log.memory if isinstance(e, AllocRecord) and e.storage not in freed]
    assert out.requires_grad
    assert (held + sum(kept)) / MIB == pytest.approx(6.02, abs=0.005)


# A norm and a layer of 64 × 96 with a bias, in fp32 under bf16 autocast, 256 tokens: bytes that come (+) and go (−), as
# ``python -m bench.transformer_engine`` finds them in Transformer Engine's own Python.
ROWS, INNER, OUTER = 256, 64, 96
X, WEIGHT, OUT = ROWS * INNER, INNER * OUTER, ROWS * OUTER
FORWARD = [2 * X, 4 * ROWS, 4 * ROWS, 2 * X, X, X, WEIGHT, WEIGHT, 2 * OUT, -X, -2 * X]
LOSS = [4 * OUT, -4 * OUT, -2 * OUT]
LINEAR = [2 * OUT, OUT, OUT, 2 * X, 2 * WEIGHT, -X, -OUT, -OUT, -2 * OUT, 4 * WEIGHT, -2 * WEIGHT, -WEIGHT, -WEIGHT]
NORM = [2 * X, -4 * ROWS, -4 * ROWS, -2 * X, 4 * X, -2 * X, -2 * X]


def test_a_real_step_tells_the_story_of_transformer_engines_own_python() -> None:
    linear = type("Linear", (Linear,), {"transposes": True})
    layers = LayerNorm(INNER, params_dtype=torch.float32), linear(INNER, OUTER, params_dtype=torch.float32)
    model = nn.Sequential(*layers).to_empty(device="cpu").train()
    x = torch.randn(4, ROWS // 4, INNER, requires_grad=True)
    recorder = StepRecorder(known=[x, *model.parameters(), *model.buffers()], parameters=[], device=DeviceKind.CPU)
    gc.disable()
    with recorder:
        recorder.recording = True
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        loss = out.float().sum()
        del out
        loss.backward()
        recorder.recording = False
    gc.enable()
    sizes = {e.storage: e.num_bytes for e in recorder.log.memory if isinstance(e, AllocRecord)}
    told = [sizes[e.storage] if isinstance(e, AllocRecord) else -sizes.get(e.storage, 0) for e in recorder.log.memory]
    told = [size for size in told if abs(size) >= 1024]
    assert told == [*FORWARD, *LOSS, *LINEAR, *NORM]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (varied(GPT2, n_layer=2, vocab_size=100), r"te changes nothing in GPT2LMHeadModel: .*; use --precision bf16"),
        (varied(BERT, num_hidden_layers=2, vocab_size=100), r"one per sequence, not per token; use --fp8-backend ao"),
        (varied(TIED, num_hidden_layers=2), r"the head of Qwen2ForCausalLM.* never trained; use --fp8-backend ao"),
    ],
)
def test_what_accelerate_would_break_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace_model(config, key(**TE))


def test_norms_put_out_16_bits() -> None:
    """torch's own put out fp32 under autocast."""
    config = varied(LLAMA, model_type="phi", num_hidden_layers=3)
    wide = []
    for own in (TE, {"device": DeviceKind.CUDA, "compute": Compute.AUTOCAST_BF16, "single_sequence": True}):
        section = first_section(trace_model(config, key(**own)), "forward.model.layers", layer=1)
        wide.append(sum(a.size.at(Point(1, 64, 0)) == 64 * 32 * 4 for a in allocations(section)))
    assert wide[0] == wide[1] - 1
