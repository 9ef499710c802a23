"""4-bit weights take the bytes that bitsandbytes gives them, and are unpacked only while they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launchkit.program import Free, Owner, Size, TensorRef, local
from launchkit.scenario import Compute, Method
from launchkit.trace import profile_model, trace_model
from launchkit.trace.quantised import packed_bytes, scale_bytes
from tests.trace.models import BERT, GPT2, LLAMA, T5, allocations, first_section, key

pytestmark = pytest.mark.filterwarnings("ignore")

functional = pytest.importorskip("bitsandbytes").functional


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (128, 1000), (63, 7)])
def test_bytes_are_those_of_a_weight_that_bitsandbytes_quantised(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    scales = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert packed_bytes(weight.numel()) == packed.nbytes
    assert scale_bytes(weight.numel()) == sum(tensor.nbytes for tensor in scales)


def test_a_block_holds_packed_weights_and_unpacks_them_for_a_product() -> None:
    program = trace_model(LLAMA, key(method=Method.QLORA, lora_targets="all-linear", compute=Compute.BF16_AUTOCAST))
    parameters = {p.name: p for p in program.groups["LlamaDecoderLayer"].parameters}
    down = parameters["mlp.down_proj.base_layer.weight"]
    assert (down.shape, down.trainable) == ((32, 48), False)
    assert (down.num_bytes(), down.extra_bytes) == (32 * 48 // 2, scale_bytes(32 * 48))
    assert parameters["mlp.down_proj.lora_A.default.weight"].trainable

    section = first_section(program, "forward.model.layers", layer=1)
    unpacked = [a for a in allocations(section) if a.size == Size.constant(32 * 48 * 2)]
    assert len(unpacked) == 3  # gate, up and down are of one size
    freed = {event.ref for event in section.events if isinstance(event, Free)}
    assert all(a.owner is Owner.TEMPORARIES and own(a.slot) in freed for a in unpacked)
    assert "lm_head.weight" in {p.name for p in program.groups["root"].parameters if not p.packed_bytes}


def test_what_is_tied_stays_as_it_is_and_biases_take_the_compute_dtype() -> None:
    """Source: transformers' ``get_keys_to_not_convert``; bitsandbytes' ``Linear4bit.forward``, which casts its bias."""
    program = trace_model(GPT2, key(method=Method.QLORA, lora_targets="all-linear", compute=Compute.BF16_AUTOCAST))
    root = {p.name: p for p in program.groups["root"].parameters}
    assert not any(p.packed_bytes for p in root.values())
    assert root["transformer.wte.weight"].itemsize == 4
    block = {p.name: p for name, group in program.groups.items() if name != "root" for p in group.parameters}
    assert block["attn.c_attn.base_layer.weight"].shape == (96, 32), "a Conv1D is turned over"
    assert block["attn.c_attn.base_layer.bias"].itemsize == 2
    assert block["ln_1.weight"].itemsize == 4


def test_a_first_layer_that_reads_another_dtype_is_of_a_kind_of_its_own() -> None:
    """Without the upcast embeddings are bf16, and what the first layer's widened norm leads to is not."""
    kept = key(method=Method.QLORA, lora_targets="all-linear", compute=Compute.BF16_AUTOCAST, cast_adapters=True)
    stage = trace_model(GPT2, kept).stage("forward.transformer.h")
    assert len({stage.layers[0], stage.layers[1], stage.layers[-1]}) > 1
    assert len(set(stage.layers[2:-1])) == 1


def test_what_a_models_class_wants_in_fp32_is_not_quantised() -> None:
    """T5's ``wo``, as transformers loads it (``HfQuantizer.get_modules_to_not_convert``)."""
    program = trace_model(T5, key(method=Method.QLORA, lora_targets="all-linear", compute=Compute.BF16_AUTOCAST))
    parameters = {p.name: p for group in program.groups.values() for p in group.parameters}
    packed = {name.split(".")[-3] for name, p in parameters.items() if p.packed_bytes}
    assert packed == {"q", "k", "v", "o", "wi"}
    assert any(".wo." in name for name in parameters)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BERT, True),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, False),  # its head has no bias
        (LLAMA, False),
    ],
)
def test_a_classifier_with_a_bias_is_quantised(config: dict[str, Any], expected: bool) -> None:
    """As seen when transformers 5.23 loads BERT, RoBERTa, DistilBERT, DeBERTa-v2 and ModernBERT in 4 bits."""
    assert profile_model(config, name="x").quantises_head is expected


def own(slot: int) -> TensorRef:
    return local("forward.model.layers", slot)
