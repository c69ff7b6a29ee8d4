"""A part of a dataset's file, which can be read apart from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from kdmesh.errors import DataError

# Little enough that processes which share a file are busy to its end, enough that handing one out costs nothing.
PIECE_BYTES = 2**20
# Of a table's group of rows, of which all before a part are decoded to come to it.
_PART_BYTES, _MOST_PARTS = 8 * 2**20, 16

ChooseColumns = Callable[[Sequence[str]], list[str]]
"""Which columns of a file to read, of those that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some rows of a file, in its order."""

    path: Path
    kind: Literal["lines", "array", "table", "row group", "batch", "messages"]
    first: int = 1  # number of its first line, or of its first row
    begin: int = 0  # of lines, a table and messages: the first byte; of a row group and a batch: its number
    size_bytes: int  # of what has a first byte: exactly; of the others: of their columns, not compressed
    skip: int = 0  # of a row group or a batch: so many rows of it belong to pieces before
    num_rows: int | None = None  # of those: how many there are; of the others None

    def parts(self) -> Iterator[Piece]:
        """A row group or a batch in parts, so that processes may share it, and tell how far they are."""
        assert self.num_rows is not None
        number = max(1, min(_MOST_PARTS, self.size_bytes // _PART_BYTES, self.num_rows))
        rows, sizes = ([total * n // number for n in range(number + 1)] for total in (self.num_rows, self.size_bytes))
        for (row, next_row), (size, next_size) in zip(pairwise(rows), pairwise(sizes), strict=True):
            yield replace(self, first=self.first + row, skip=row, num_rows=next_row - row, size_bytes=next_size - size)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of a file that it cannot be read: a DataError with its name and why."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def text_of(path: Path, data: bytes, *, begin: int) -> str:
    """The text in bytes of a file, of which the first is number `begin`. Raises DataError when it is not UTF-8."""
    try:
        # A byte order mark is not part of the first line.
        return data.decode("utf-8-sig" if begin == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {begin + error.start}") from error
