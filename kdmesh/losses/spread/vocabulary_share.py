"""Which tokens of the vocabulary a rank has, and what ranks that have all of them exchange."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Of one tensor each. torch 2.13 gave them these names; one before it, which we allow, has only the old ones.
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabularyShare:
    """One rank's tokens: contiguous, as many for each rank but the last ones, which may have fewer or none.

    Every method but the properties is collective. Ranks have different numbers of rows, which `counts` tells by rank.
    """

    vocabulary_size: int  # real tokens
    padded_size: int  # rows of the whole head
    rank: int
    num_ranks: int
    group: dist.ProcessGroup | None = None  # None: all ranks of the job

    @property
    def longest(self) -> int:
        """Rows of the head on a rank that has most."""
        return -(-self.padded_size // self.num_ranks)

    @property
    def first(self) -> int:
        """This rank's first token."""
        return min(self.rank * self.longest, self.padded_size)

    @property
    def num_padded(self) -> int:
        """This rank's rows of the head."""
        return min(self.first + self.longest, self.padded_size) - self.first

    @property
    def num_tokens(self) -> int:
        """This rank's real tokens."""
        return max(0, min(self.first + self.num_padded, self.vocabulary_size) - self.first)

    def rounds(self, counts: Sequence[int], most: int) -> Iterator[tuple[slice, list[int]]]:
        """Which of its own rows each rank brings in turn, all together `most`, or one each; and how many by rank.

        The rows are those of this rank. Not collective.
        """
        each = max(1, most // self.num_ranks)
        for start in range(0, max(counts), each):
            taken = [min(max(0, count - start), each) for count in counts]
            yield slice(start, start + taken[self.rank]), taken

    def numbers(self, *own: int) -> list[list[int]]:
        """What every rank passes, by rank. On the CPU, so that nothing waits for a GPU."""
        everyone = torch.empty(self.num_ranks, len(own), dtype=torch.int64)
        _all_gather(everyone, torch.tensor([own], dtype=torch.int64), group=self.group)
        numbers: list[list[int]] = everyone.tolist()
        return numbers

    def gather(self, own_N: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of every rank, one rank after the other; of any shape and type, the same on all ranks."""
        longest = max(counts)
        whole_N = _lengthened(own_N, longest)
        everyone = whole_N.new_empty(self.num_ranks * longest, *own_N.shape[1:])
        # As bytes: not every backend gathers every type.
        _all_gather(_as_bytes(everyone), _as_bytes(whole_N), group=self.group)
        if min(counts) == longest:
            return everyone
        return torch.cat([part_N[:count] for part_N, count in zip(torch.split(everyone, longest), counts, strict=True)])

    def add_up(self, rows_N: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's rows of what `gather` gave, each the sum of what all ranks made of it. Floating point."""
        longest = max(counts)
        if min(counts) < longest:
            parts = [_lengthened(part_N, longest) for part_N in torch.split(rows_N, list(counts))]
            rows_N = torch.cat(parts)
        own_N = rows_N.new_empty(longest, *rows_N.shape[1:])
        _reduce_scatter(own_N, rows_N.contiguous(), group=self.group)
        return own_N[: counts[self.rank]]

    def beside_each_other(self, own: Tensor) -> Tensor:
        """[W, ...] what every rank passes, by rank; of one shape on all ranks."""
        everyone = own.new_empty(self.num_ranks * len(own), *own.shape[1:])
        _all_gather(everyone, own.contiguous(), group=self.group)
        return everyone.view(self.num_ranks, *own.shape)


def _lengthened(rows_N: Tensor, length: int) -> Tensor:
    """The rows with zeros behind them."""
    missing = length - len(rows_N)
    if missing == 0:
        return rows_N.contiguous()
    return torch.cat([rows_N, rows_N.new_zeros(missing, *rows_N.shape[1:])])


def _as_bytes(rows_N: Tensor) -> Tensor:
    return rows_N.flatten().view(torch.uint8)
