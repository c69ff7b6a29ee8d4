"""Rows of CSV files: a header, then texts, of which some may have several lines."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kdmesh.errors import DataError
from kdmesh_trainer.data.files.piece import PIECE_BYTES, ChooseColumns, Piece, text_of

_LONGEST_FIELD = 2**31 - 1  # bytes; a text may be longer than what Python's reader takes unasked
_OTHER_MARKS = {";": "semicolons", "\t": "tabs"}  # between fields, as some programs write them


def csv_pieces(path: Path) -> Iterator[Piece]:
    """All of a file, the header in the first piece. Raises DataError when it cannot be read as CSV."""
    with path.open("rb") as file:
        lines = _Lines(path, file)
        begin, first = 0, 1
        with _refusing(path, lines):
            for _ in _records(lines):
                if lines.num_bytes - begin >= PIECE_BYTES:
                    yield Piece(path=path, kind="table", first=first, begin=begin, size_bytes=lines.num_bytes - begin)
                    begin, first = lines.num_bytes, lines.num_lines + 1
        if lines.num_bytes > begin:
            yield Piece(path=path, kind="table", first=first, begin=begin, size_bytes=lines.num_bytes - begin)


def csv_rows(piece: Piece, choose: ChooseColumns) -> Iterator[tuple[str, object]]:
    """Each row of a piece after its origin; blank lines are none.

    Raises:
        DataError: the header has no commas but other marks, or names a column twice, or not; or a row has other numbers
            of fields.
    """
    with piece.path.open("rb") as file:
        header = _header(piece.path, file)
        wanted = {name: header.index(name) for name in choose(header)}
        file.seek(piece.begin)
        data = file.read(piece.size_bytes)
    if len(data) < piece.size_bytes:
        raise DataError(f"{piece.path} has changed while it was read")
    lines = _Lines(piece.path, io.BytesIO(data), first_line=piece.first, begin=piece.begin)
    with _refusing(piece.path, lines):
        records = _records(lines)
        if piece.begin == 0:
            next(records)
        begins = lines.num_lines + 1
        for record in records:
            origin, begins = f"{piece.path}:{begins}", lines.num_lines + 1
            if not record:
                continue
            if len(record) != len(header):
                raise DataError(f"{origin}: {_fields(len(record))}, and the header has {len(header)}")
            yield origin, {name: record[place] for name, place in wanted.items()}


class _Lines:
    """The lines of a file, and how far they have been taken."""

    def __init__(self, path: Path, file: IO[bytes], *, first_line: int = 1, begin: int = 0) -> None:
        self._path = path
        self._file = file
        self.num_bytes = begin
        self.num_lines = first_line - 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        text = text_of(self._path, line, begin=self.num_bytes)
        self.num_bytes += len(line)
        self.num_lines += 1
        return text


def _records(lines: _Lines) -> Iterator[list[str]]:
    csv.field_size_limit(_LONGEST_FIELD)
    return csv.reader(lines, strict=True)


def _fields(number: int) -> str:
    return "1 field" if number == 1 else f"{number} fields"


def _header(path: Path, file: IO[bytes]) -> list[str]:
    lines = _Lines(path, file)
    with _refusing(path, lines):
        header = next(_records(lines), [])
    unfit = [name for name, times in Counter(header).items() if times > 1 or not name]
    if unfit or not header:
        raise DataError(f"{path}:1: a header must name each column once; found: {', '.join(header) or 'nothing'}")
    other = next((word for mark, word in _OTHER_MARKS.items() if mark in header[0]), None)
    if len(header) == 1 and other is not None:
        raise DataError(f"{path}:1: fields are divided by commas, and not by {other}; the header is {header[0]!r}")
    return header


@contextmanager
def _refusing(path: Path, lines: _Lines) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise DataError(f"{path}:{lines.num_lines}: not CSV: {error}") from None
