"""A part of a dataset's file, which can be read apart from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdmesh.errors import DataError

# Little enough that processes which share a file are busy to its end, enough that handing one out costs nothing.
PIECE_BYTES = 2**20

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
