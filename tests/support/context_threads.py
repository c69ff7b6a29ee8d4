"""Context groups whose ranks are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from kdmesh.models.context import ContextGroup

T = TypeVar("T")


class _Board:
    """Where every rank leaves a value and sees those of the others."""

    def __init__(self, size: int) -> None:
        self._values: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=10)

    def gather(self, place: int, value: Any) -> list[Any]:
        """The values of all ranks, when all have come."""
        self._values[place] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class _Rank:
    """What a ContextGroup does for a teacher's rows."""

    def __init__(self, place: int, size: int, board: _Board) -> None:
        self.place = place
        self.size = size
        self._board = board

    def tell(self, values: Sequence[int]) -> list[list[int]]:
        told: list[list[int]] = self._board.gather(self.place, list(values))
        assert len({len(each) for each in told}) == 1, "every rank tells as many"
        return told

    def move_rows(self, rows_RX: Tensor, *, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        assert sum(sent) == len(rows_RX)
        parts = [part[self.place] for part in self._board.gather(self.place, torch.split(rows_RX, list(sent)))]
        assert [len(part) for part in parts] == list(received)
        return torch.cat(parts)


def on_ranks(size: int, call: Callable[[ContextGroup], T]) -> list[T]:
    """What `call` returns on each rank of a group."""
    board = _Board(size)
    with ThreadPoolExecutor(size) as threads:
        ranks = [cast(ContextGroup, _Rank(place, size, board)) for place in range(size)]
        return list(threads.map(call, ranks))
