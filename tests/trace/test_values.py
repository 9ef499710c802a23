"""Whole numbers have values on fake tensors where that is asked for, and nothing else has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from launchkit.trace.compat import full_sequences
from launchkit.trace.values import known_numbers, numbers_are_known, value_of

TOKEN = 7


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, known_numbers(mode):
        yield mode


@pytest.fixture
def ids(mode: FakeTensorMode) -> torch.Tensor:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    ids[:, 1:4] = TOKEN
    return ids


def test_numbers_are_read_back(ids: torch.Tensor) -> None:
    assert type(ids) is FakeTensor
    assert ids.tolist() == [[0, TOKEN, TOKEN, TOKEN, 0, 0]] * 2
    assert (ids == TOKEN).sum().item() == 6
    assert torch.tensor([ids[0].max() + 1, 3]).tolist() == [TOKEN + 1, 3]
    assert [part.shape[0] for part in torch.arange(6).split((ids == TOKEN).sum(1).tolist())] == [3, 3]


def test_a_mask_picks_as_many_as_it_has() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, known_numbers(mode), full_sequences():
        ids = torch.zeros(2, 6, dtype=torch.int64)
        ids[:, 1:4] = TOKEN
        assert torch.empty(2, 6, 5)[ids == TOKEN].shape == (6, 5)


def test_a_part_written_to_is_written_in_the_whole(ids: torch.Tensor) -> None:
    row = ids[1]
    row += 1
    assert ids.tolist()[1] == [1, TOKEN + 1, TOKEN + 1, TOKEN + 1, 1, 1]
    assert row.untyped_storage()._cdata == ids.untyped_storage()._cdata


def test_what_is_not_known_makes_unknown(ids: torch.Tensor) -> None:
    ids[0] = torch.empty(6).long()
    assert value_of(ids) is None
    assert value_of(torch.empty(4)) is None
    with pytest.raises(DataDependentOutputException):
        ids.tolist()


def test_no_image_is_taken_for_padding(mode: FakeTensorMode) -> None:
    pixels = torch.empty(3, 2, 8, 8)
    is_real = (pixels == 0.0).sum(dim=(1, 2, 3)) != pixels[0].numel()
    assert is_real.tolist() == [True] * 3


def test_afterwards_all_is_as_before() -> None:
    before = FakeTensor.tolist, torch.tensor
    mode = FakeTensorMode()
    with mode, known_numbers(mode):
        assert numbers_are_known()
    assert not numbers_are_known()
    assert (FakeTensor.tolist, torch.tensor) == before
    with mode:
        assert value_of(torch.zeros(2, dtype=torch.int64)) is None
