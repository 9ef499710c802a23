"""Checkpoints by their parts, against what two processes wrote (``bench.disk``)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchkit.planner.disk import checkpoint_files
from launchkit.planner.sizes import ModelSizes
from launchkit.recipe import KEPT_CHECKPOINTS
from launchkit.scenario import Split
from tests.builders import scenario

# The Llama of ``bench.disk``, trained in fp32 with AdamW: 27,073,024 parameters in 57 tensors.
FULL = ModelSizes(
    stored_bytes=108_292_096,
    loaded_bytes=108_292_096,
    state_dict_bytes=108_292_096,
    trained_bytes=108_292_096,
    num_trained=27_073_024,
    num_trained_tensors=57,
    state_bytes=216_584_420,
    num_state_tensors=171,
    num_scalar_states=57,
    largest_tensor_bytes=16_384_000,
    largest_unit_bytes=32_770_048,
    largest_unpacked_bytes=0,
)
# Rank 16 on all its linear layers: 933,888 parameters in 84 tensors.
LORA = replace(
    FULL,
    state_dict_bytes=112_027_648,
    trained_bytes=3_735_552,
    num_trained=933_888,
    num_trained_tensors=84,
    state_bytes=7_471_440,
    num_state_tensors=252,
    num_scalar_states=84,
)
# Under ZeRO the states are of one flat tensor; weights are 16-bit, but for adapters under ZeRO-3.
ZERO_FULL = replace(FULL, trained_bytes=54_146_048, state_bytes=216_584_196, num_state_tensors=3, num_scalar_states=1)
ZERO_LORA = replace(LORA, trained_bytes=1_867_776, state_bytes=7_471_108, num_state_tensors=3, num_scalar_states=1)


@pytest.mark.parametrize(
    ("strategy", "sizes", "settings", "written_bytes"),
    [
        ("single", FULL, {}, 324_952_598),
        ("single", LORA, {"method": "lora"}, 11_314_782),
        ("ddp", LORA, {"method": "lora"}, 11_329_264),
        ("fsdp2", FULL, {}, 433_281_493),
        ("fsdp2", LORA, {"method": "lora"}, 15_102_325),
        ("fsdp2", FULL, {"full_state_dict": False}, 325_693_037),
        ("fsdp2", LORA, {"method": "lora", "full_state_dict": False}, 12_418_663),
        ("zero1", ZERO_FULL, {}, 433_286_895),
        ("zero2", ZERO_FULL, {}, 433_286_895),
        ("zero2", ZERO_LORA, {"method": "lora"}, 15_120_315),
        ("zero3", ZERO_FULL, {}, 379_178_233),
        ("zero3", replace(ZERO_LORA, trained_bytes=3_735_552), {"method": "lora"}, 15_212_891),
        ("zero3", ZERO_FULL, {"gather_16bit_weights_on_model_save": False}, 325_025_937),
    ],
)
def test_a_checkpoint_is_as_large_as_measured(
    strategy: str, sizes: ModelSizes, settings: dict[str, object], written_bytes: int
) -> None:
    files = checkpoint_files(sizes, scenario(strategy=strategy, **settings), num_ranks=2)
    assert files.total_bytes == pytest.approx(written_bytes, rel=0.01)
    assert files.total_bytes == files.weights_bytes + files.engine_weights_bytes + files.optimizer_bytes


def test_of_a_model_that_transformers_splits_the_weights_alone_are_saved() -> None:
    """Rank 16 on a Llama of 2 layers and 0.6M parameters, two processes: 142,808 bytes were written."""
    sizes = replace(LORA, trained_bytes=139_264, num_trained_tensors=28)
    files = checkpoint_files(sizes, scenario(method="lora", split=Split(tp=2)), num_ranks=2)
    assert (files.engine_weights_bytes, files.optimizer_bytes) == (0, 0)
    assert files.total_bytes == pytest.approx(142_808, rel=0.01)


def test_disk_holds_what_is_kept_what_is_written_and_the_final_model() -> None:
    files = checkpoint_files(FULL, scenario(), num_ranks=1)
    assert files.num_kept == KEPT_CHECKPOINTS
    assert files.disk_peak_bytes == (KEPT_CHECKPOINTS + 1) * files.total_bytes + files.weights_bytes


def test_shards_are_written_side_by_side() -> None:
    shards = scenario(strategy="fsdp2", full_state_dict=False)
    alone, four = (checkpoint_files(FULL, shards, num_ranks=ranks).write_seconds for ranks in (1, 4))
    assert alone == pytest.approx(4 * four, rel=0.01)  # each rank describes its pieces
