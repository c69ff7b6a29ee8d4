"""Sequences laid end to end in one row, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kdmesh.types import TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedImages:
    """What a row's image tokens stand for; without positions of their own they are numbered as words are."""

    inputs: Mapping[str, Tensor]  # of all images in order, by the names that the model's forward pass has for them
    position_ids_3T: Tensor | None  # [3, T] int64 in time, height and width; restarts at 0 with every sequence

    def to(self, device: torch.device) -> PackedImages:
        """The same images on `device`; a GPU is not waited for."""
        return PackedImages(
            inputs={name: moved(tensor, device) for name, tensor in self.inputs.items()},
            position_ids_3T=None if self.position_ids_3T is None else moved(self.position_ids_3T, device),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedTokens:
    """Sequences end to end and the rows that carry loss; or a slice of that, which one rank of several holds."""

    token_ids_T: Tensor  # [T] int64
    position_ids_T: Tensor  # [T] int64, restarts at 0 with every sequence
    lengths: tuple[int, ...]  # of the sequences, in order; their sum is T, or that of all slices
    rows_R: Tensor  # [R] int64, strictly increasing indices into T
    labels_R: Tensor  # [R] int64, the token that each row predicts
    images: PackedImages | None = None  # None: it is all text
    starts: Tensor | None = None  # [sequences + 1] int32, see with_starts; None: nobody asked for them

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids_T)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.rows_R)

    def with_starts(self, lengths: tuple[int, ...] | None = None) -> PackedTokens:
        """The same with `starts`, so that attention takes all sequences in one call. Before `to`.

        Args:
            lengths: of the sequences of such a call, of which `starts` tells where each begins, and where the last one
                ends; None: `self.lengths`.
        """
        return replace(self, starts=torch.from_numpy(np.cumsum((0, *(lengths or self.lengths)), dtype=np.int32)))

    def to(self, device: torch.device) -> PackedTokens:
        """The same tokens on `device`; a GPU is not waited for."""
        return replace(
            self,
            token_ids_T=moved(self.token_ids_T, device),
            position_ids_T=moved(self.position_ids_T, device),
            rows_R=moved(self.rows_R, device),
            labels_R=moved(self.labels_R, device),
            images=None if self.images is None else self.images.to(device),
            starts=None if self.starts is None else moved(self.starts, device),
        )


def pack(sequences: Sequence[TokenSequence]) -> PackedTokens:
    """One packed row of at least one sequence; rows come in the order of the sequences and their positions.

    Of images only the tokens: see image_packing.py.
    """
    lengths = tuple(sequence.num_tokens for sequence in sequences)
    starts = np.cumsum((0, *lengths[:-1]))
    return PackedTokens(
        token_ids_T=_int64([sequence.token_ids for sequence in sequences]),
        position_ids_T=_int64([np.arange(length) for length in lengths]),
        lengths=lengths,
        rows_R=_int64([sequence.positions + start for sequence, start in zip(sequences, starts, strict=True)]),
        labels_R=_int64([sequence.labels for sequence in sequences]),
    )


def slice_of(packed: PackedTokens, *, place: int, size: int) -> PackedTokens:
    """Of `size` equal slices of a row of text the one at `place`, with the rows that it holds; see context.py.

    What is missing to equal slices is put at the end, as a sequence of its own that asks for no row.
    """
    missing = -packed.num_tokens % size
    token_ids_T = torch.cat([packed.token_ids_T, packed.token_ids_T.new_zeros(missing)])
    position_ids_T = torch.cat([packed.position_ids_T, torch.arange(missing)])
    begin, end = slice_bounds(packed.num_tokens, size)[place : place + 2]
    first, stop = torch.searchsorted(packed.rows_R, torch.tensor([begin, end])).tolist()
    return replace(
        packed,
        token_ids_T=token_ids_T[begin:end],
        position_ids_T=position_ids_T[begin:end],
        lengths=(*packed.lengths, missing) if missing else packed.lengths,
        rows_R=packed.rows_R[first:stop] - begin,
        labels_R=packed.labels_R[first:stop],
    )


def slice_bounds(num_tokens: int, size: int) -> range:
    """Where each of `size` equal slices of a row begins, and where the last one ends, which may be beyond the row."""
    length = -(-num_tokens // size)
    return range(0, length * size + 1, length)


@dataclass(frozen=True, slots=True)
class Slice:
    """What one of several equal slices of a row has of its sequences."""

    lengths: tuple[int, ...]  # its tokens of each sequence that it has some of, in order
    before: int  # tokens of the first of them that lie in slices before it


@lru_cache(maxsize=64)  # every layer of a forward and a backward pass asks
def slices_of(lengths: tuple[int, ...], size: int) -> tuple[Slice, ...]:
    """All slices of a row of sequences of `lengths` tokens, whose sum `size` divides."""
    ends = np.cumsum(lengths)
    bounds = range(0, int(ends[-1]) + 1, int(ends[-1]) // size)
    slices = []
    for begin, end in pairwise(bounds):
        first, last = (int(n) for n in np.searchsorted(ends, (begin, end - 1), side="right"))
        edges = [begin, *(int(edge) for edge in ends[first:last]), end]
        own = tuple(later - earlier for earlier, later in pairwise(edges))
        slices.append(Slice(lengths=own, before=begin - int(ends[first]) + lengths[first]))
    return tuple(slices)


def blank() -> PackedTokens:
    """Two tokens that ask for no row, for a rank that only takes part in the collectives."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return PackedTokens(
        token_ids_T=torch.zeros(2, dtype=torch.int64),
        position_ids_T=torch.arange(2),
        lengths=(2,),
        rows_R=nothing,
        labels_R=nothing,
    )


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The same tensor on `device`; a GPU is not waited for."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return pinned_copy(tensor).to(device, non_blocking=True)


def pinned_copy(tensor: Tensor) -> Tensor:
    """The same tensor in pinned memory of its own, which a GPU may still read when the original has changed.

    From pageable memory the host would wait until the GPU has done all that it was given before. Not `pin_memory()`:
    that fails on strides of 0, and returns the original where it is pinned already, as a slot may be that the teacher
    writes into again.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
