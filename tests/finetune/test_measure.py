"""Measuring: the allocation timeline, the collator's counts, the proof. Needs torch."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from launchkit.finetune.batches import RightPadded, TokenRows  # noqa: E402
from launchkit.finetune.proof import biggest_module, foreign_storages, held_addresses, read_proof  # noqa: E402
from launchkit.finetune.timeline import AllocationTimeline  # noqa: E402

MIB = 1024**2


@pytest.mark.filterwarnings("ignore")
def test_timeline_sees_each_windows_own_peak() -> None:
    timeline = AllocationTimeline()
    timeline.start()
    kept = torch.empty(MIB, dtype=torch.uint8)
    begin = time.time_ns()
    passing = torch.empty(4 * MIB, dtype=torch.uint8)
    del passing
    middle = time.time_ns()
    later = torch.empty(2 * MIB, dtype=torch.uint8)
    end = time.time_ns()
    timeline.stop()
    assert timeline.peak_bytes(begin, middle) == 5 * MIB
    assert timeline.peak_bytes(middle, end) == 3 * MIB
    assert timeline.peak_bytes(end, end + 1) == 3 * MIB
    assert timeline.holds(kept.data_ptr())
    assert timeline.holds(later.data_ptr())
    assert not timeline.holds(later.data_ptr() + 1)


@pytest.mark.filterwarnings("ignore")
def test_what_another_thread_frees_counts_in_its_own_step_only() -> None:
    timeline = AllocationTimeline()
    timeline.start()
    kept = torch.empty(MIB, dtype=torch.uint8)
    begin = time.time_ns()
    buffers = [torch.empty(4 * MIB, dtype=torch.uint8)]
    thread = threading.Thread(target=buffers.clear)
    thread.start()
    thread.join()
    middle = time.time_ns()
    later = torch.empty(2 * MIB, dtype=torch.uint8)
    end = time.time_ns()
    timeline.stop()
    timeline.lay_ghosts([kept.data_ptr(), later.data_ptr()])
    assert timeline.peak_bytes(begin, middle) == 5 * MIB
    assert timeline.ghost_bytes(begin, middle) == 4 * MIB
    assert timeline.peak_bytes(middle, end) == 3 * MIB
    assert timeline.ghost_bytes(middle, end) == 0


def test_held_addresses_include_gradients() -> None:
    module = torch.nn.Linear(8, 8)
    module(torch.ones(1, 8)).sum().backward()
    found = held_addresses(module)
    assert {module.weight.data_ptr(), module.weight.grad.data_ptr()} <= set(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("used", ["a", "ab"])
def test_of_a_mapped_file_only_what_is_used_counts(used: str, tmp_path: Path) -> None:
    """safetensors gives each tensor a piece of one mapping."""
    save_file({"a": torch.ones(MIB), "b": torch.ones(MIB)}, tmp_path / "model.safetensors")
    timeline = AllocationTimeline()
    timeline.start()
    tensors = load_file(tmp_path / "model.safetensors")
    module = torch.nn.ParameterList(tensors[name] for name in used)
    end = time.time_ns()
    timeline.stop()
    foreign = foreign_storages(module, timeline.holds)
    timeline.leave_out_mappings(foreign)
    assert timeline.peak_bytes(end, end + 1) + sum(foreign.values()) == pytest.approx(len(used) * 4 * MIB, abs=4096)


def test_parameters_of_other_allocators_are_counted_apart() -> None:
    module = torch.nn.Linear(8, 8, bias=True)
    known = module.weight.untyped_storage().data_ptr()
    assert foreign_storages(module, lambda address: address == known) == {module.bias.data_ptr(): 8 * 4}
    assert sum(foreign_storages(module, lambda _: False).values()) == (64 + 8) * 4


def test_proof_of_a_single_process() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 4)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    num_parameters = 64 * 32 + 32 + 32 * 4 + 4
    proof = read_proof(optimizer)
    assert biggest_module() is model
    assert proof.wrappers == ()
    assert (proof.world_size, proof.num_parameters, proof.num_optimizer_parameters) == (1,) + (num_parameters,) * 2
    assert proof.parameter_dtypes == {"bfloat16": num_parameters}
    assert proof.optimizer_state_dtypes == {"bfloat16": 2 * num_parameters}


@pytest.mark.parametrize(("length", "width"), [(0, 3), (8, 8)])
def test_right_padding(length: int, width: int) -> None:
    collator = RightPadded(pad_token_id=9, length=length)
    batch = collator([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert batch["input_ids"][1].tolist() == [4] + [9] * (width - 1)
    assert batch["labels"][1].tolist() == [4] + [-100] * (width - 1)
    assert set(batch) == {"input_ids", "labels"}
    assert (collator.num_tokens, collator.num_batches, collator.longest_tokens) == (2 * width, 1, width)


def test_positions_for_trl() -> None:
    batch = RightPadded(pad_token_id=0, with_positions=True)([TokenRows([[1, 2], [3]])[i] for i in (0, 1)])
    assert batch["position_ids"].tolist() == [[0, 1], [0, 1]]


def test_a_mask_hides_what_is_padded() -> None:
    batch = RightPadded(pad_token_id=0, hides_padding=True)([TokenRows([[1, 2], [3]])[i] for i in (0, 1)])
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
