"""Packed rows hold exactly the sequences, in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdmesh.models.packing import Slice, blank, pack, pinned_copy, slice_of, slices_of
from kdmesh.types import TokenSequence
from tests.support.sequences import random_sequences


def test_tokens_lie_end_to_end_and_positions_restart() -> None:
    sequences = random_sequences([3, 2, 5], vocabulary_size=50)
    packed = pack(sequences)
    assert packed.token_ids_T.tolist() == [i for s in sequences for i in s.token_ids]
    assert packed.position_ids_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]
    assert packed.lengths == (3, 2, 5)
    assert (packed.token_ids_T.dtype, packed.position_ids_T.dtype) == (torch.int64, torch.int64)


def test_rows_point_at_the_wanted_positions_and_labels_at_the_next_token() -> None:
    sequences = random_sequences([3, 2, 9], vocabulary_size=50)
    packed = pack(sequences)
    assert packed.num_rows == sum(s.num_rows for s in sequences)
    assert packed.token_ids_T[packed.rows_R].tolist() == [i for s in sequences for i in s.token_ids[s.positions]]
    assert packed.token_ids_T[packed.rows_R + 1].tolist() == packed.labels_R.tolist()
    assert packed.labels_R.tolist() == [i for s in sequences for i in s.labels]


def test_a_packed_row_owns_its_memory() -> None:
    ids = np.array([4, 5, 6], np.int32)
    packed = pack([TokenSequence(token_ids=ids, positions=np.array([0], np.int32))])
    ids[:] = 0
    assert packed.token_ids_T.tolist() == [4, 5, 6]


def test_a_blank_row_asks_for_nothing() -> None:
    packed = blank()
    assert (packed.num_tokens, packed.num_rows, packed.lengths) == (2, 0, (2,))
    assert packed.labels_R.dtype == packed.rows_R.dtype == torch.int64


def test_starts_are_made_for_whom_they_are_asked() -> None:
    packed = pack(random_sequences([3, 2, 5], vocabulary_size=50))
    assert packed.starts is None
    starts = packed.with_starts().to(torch.device("cpu")).starts
    assert starts is not None
    assert (starts.tolist(), starts.dtype) == ([0, 3, 5, 10], torch.int32)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [[3, 2, 9], [8], [2], [5, 5, 5, 5]])
def test_slices_are_equal_and_together_the_row(lengths: list[int], size: int) -> None:
    packed = pack(random_sequences(lengths, vocabulary_size=50))
    slices = [slice_of(packed, place=place, size=size) for place in range(size)]
    assert len({part.num_tokens for part in slices}) == 1
    assert len({part.lengths for part in slices}) == 1
    missing = sum(part.num_tokens for part in slices) - packed.num_tokens
    assert 0 <= missing < size
    assert slices[0].lengths == (*packed.lengths, *([missing] if missing else []))
    for name in ("token_ids_T", "position_ids_T"):
        together = torch.cat([getattr(part, name) for part in slices])
        assert torch.equal(together[: packed.num_tokens], getattr(packed, name))
    assert torch.cat([part.labels_R for part in slices]).tolist() == packed.labels_R.tolist()
    rows = [part.rows_R + place * part.num_tokens for place, part in enumerate(slices)]
    assert torch.cat(rows).tolist() == packed.rows_R.tolist()
    assert all(0 <= row < part.num_tokens for part in slices for row in part.rows_R.tolist())


def test_slices_know_their_part_of_each_sequence_and_what_is_before_it() -> None:
    assert slices_of((9, 30, 2, 17, 5), 3) == (Slice((9, 12), 0), Slice((18, 2, 1), 12), Slice((16, 5), 1))
    assert slices_of((4, 4), 2) == (Slice((4,), 0), Slice((4,), 0))
    assert slices_of((12,), 4) == tuple(Slice((3,), before) for before in (0, 3, 6, 9))


def test_starts_of_a_slice_are_those_of_what_it_has() -> None:
    starts = pack(random_sequences([3, 2, 5], vocabulary_size=50)).with_starts((2, 3)).starts
    assert starts is not None
    assert starts.tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    "tensor", [torch.arange(4).expand(3, -1), torch.arange(12).view(3, 4).T, torch.arange(3), torch.zeros(0, 2)]
)
def test_what_a_gpu_reads_is_a_pinned_copy_whatever_the_strides(
    tensor: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def empty(*args: Any, pin_memory: bool, **options: Any) -> Tensor:
        asked.append(pin_memory)  # which needs a GPU
        return torch.zeros(*args, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(Tensor, "pin_memory", lambda itself: itself)  # as where it is pinned already
    copy = pinned_copy(tensor)
    assert asked == [True]
    assert copy.is_contiguous()
    assert torch.equal(copy, tensor)
    assert copy.dtype == tensor.dtype
    assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()
