"""Rows of Parquet and Arrow files as objects of Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdmesh.errors import DataError
from kdmesh_trainer.data.files.piece import ChooseColumns


@contextmanager
def reading_as(kind: str, path: Path) -> Iterator[None]:
    """Say of a file that it is not of that kind: a DataError with its name and why."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowMemoryError as error:
        raise DataError(f"{path} is damaged, or needs more memory than there is: {error}") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter of a column's name
        raise DataError(f"{path} is not {kind} file: {error}") from error


def chosen_columns(path: Path, names: Sequence[str], choose: ChooseColumns) -> list[str]:
    """Those of a file's columns that are read. Raises DataError when two of them have one name."""
    chosen = choose(names)
    twice = next((name for name in chosen if chosen.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has several columns {twice!r}; a row has each once")
    return chosen


def objects_of(path: Path, batch: Any, *, first: int) -> Iterator[tuple[str, object]]:
    """Each row of a batch, of which the first is row number `first`, after its origin.

    Raises:
        DataError: Python has no object for a value, as for a text that is not UTF-8, or a day after the year 9999.
    """
    try:
        rows: Iterator[object] = iter(batch.to_pylist())
    except (ValueError, OverflowError):  # which does not say where
        rows = (_object(path, batch, place, first=first) for place in range(batch.num_rows))
    for number, row in enumerate(rows, start=first):
        yield f"{path}: row {number}", row


def _object(path: Path, batch: Any, place: int, *, first: int) -> object:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[place].as_py()
        except (ValueError, OverflowError) as error:
            raise DataError(f"{path}: row {first + place}: {name} cannot be read: {error}") from None
    return row
