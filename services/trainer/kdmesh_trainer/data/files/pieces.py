"""The files of a dataset, in pieces that can be read apart from each other."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, assert_never

from kdmesh.errors import DataError
from kdmesh.hub import ROW_SUFFIXES
from kdmesh_trainer.data.files.arrow_files import arrow_pieces, arrow_rows, saved_files
from kdmesh_trainer.data.files.csv_files import csv_pieces, csv_rows
from kdmesh_trainer.data.files.piece import PIECE_BYTES, ChooseColumns, Piece, reading, text_of
from kdmesh_trainer.data.files.table_rows import chosen_columns, objects_of, reading_as

_DECODED = 1024  # rows at a time


def find_files(path: Path) -> tuple[Path, ...]:
    """The file at `path`, or those of that directory: as it tells their order itself, or by name.

    Raises:
        DataError: there is none of a known kind, it is not clear which are meant, or nobody may look.
    """
    with reading(path):
        return _found(path)


def _found(path: Path) -> tuple[Path, ...]:
    known = ", ".join(ROW_SUFFIXES)
    if path.is_dir():
        if (saved := saved_files(path)) is not None:
            return saved
        files = tuple(sorted(file for file in path.iterdir() if file.suffix in ROW_SUFFIXES and file.is_file()))
        if not files:
            raise DataError(f"no dataset in directory {path}: it holds no file of the kinds {known}")
        return files
    if not path.exists():
        raise DataError(f"no dataset at {path}: there is no such file or directory")
    if not path.is_file():
        raise DataError(f"no dataset at {path}: it is neither a file nor a directory")
    if path.suffix not in ROW_SUFFIXES:
        raise DataError(f"{path} is of an unknown kind; known: {known}")
    return (path,)


def size_of(path: Path) -> int:
    """What the sizes of a file's pieces add up to. Raises DataError when it cannot be read."""
    with reading(path):
        if path.suffix in (".parquet", ".arrow"):
            return sum(piece.size_bytes for piece in pieces_of(path))
        return path.stat().st_size


def pieces_of(path: Path) -> Iterator[Piece]:
    """All of a file: lines and CSV by the megabyte, row groups of Parquet and batches of Arrow whole or, where they are
    large, in parts, an array as a whole.

    Raises:
        DataError: it cannot be read.
    """
    with reading(path):
        if path.suffix == ".parquet":
            yield from _row_groups(path)
        elif path.suffix == ".arrow":
            yield from arrow_pieces(path)
        elif path.suffix == ".csv":
            yield from csv_pieces(path)
        elif path.suffix == ".json" and _is_array(path):
            yield Piece(path=path, kind="array", size_bytes=path.stat().st_size)
        else:
            yield from _lines(path)


def rows_of(piece: Piece, choose: ChooseColumns) -> Iterator[tuple[str, object]]:
    """Each row of a piece after its origin: path and line, or path and number of the row.

    Raises:
        DataError: it cannot be read, or is not what its name says.
    """
    with reading(piece.path):
        match piece.kind:
            case "row group":
                yield from _parquet_rows(piece, choose)
            case "batch" | "messages":
                yield from arrow_rows(piece, choose)
            case "table":
                yield from csv_rows(piece, choose)
            case "array":
                rows: Any = _parse(text_of(piece.path, piece.path.read_bytes(), begin=0), piece.path, first_line=1)
                for number, row in enumerate(rows, start=1):
                    yield f"{piece.path}: row {number}", row
            case "lines":
                yield from _json_lines(piece)
            case _:
                assert_never(piece.kind)


def _is_array(path: Path) -> bool:
    """Whether a .json file is one array of rows; one object per line is taken too, because many are named so."""
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        return first == b"["


def _lines(path: Path) -> Iterator[Piece]:
    with path.open("rb") as file:
        begin, first = 0, 1
        while chunk := file.read(PIECE_BYTES):
            chunk += file.readline()  # to the end of the line
            yield Piece(path=path, kind="lines", first=first, begin=begin, size_bytes=len(chunk))
            begin += len(chunk)
            first += chunk.count(b"\n")


def _json_lines(piece: Piece) -> Iterator[tuple[str, object]]:
    with piece.path.open("rb") as file:
        file.seek(piece.begin)
        data = file.read(piece.size_bytes)
    if len(data) < piece.size_bytes:
        raise DataError(f"{piece.path} has changed while it was read")
    lines: IO[str] = io.StringIO(text_of(piece.path, data, begin=piece.begin), newline=None)
    for number, line in enumerate(lines, start=piece.first):
        if line.strip():
            yield f"{piece.path}:{number}", _parse(line.rstrip(), piece.path, first_line=number)


def _parse(text: str, path: Path, *, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        is_lines = path.suffix == ".json" and not _is_array(path)
        rule = "; in a .json file that is no array each line is a row" if is_lines else ""
        what = error.msg.removesuffix(" at")
        raise DataError(f"{path}:{line}: not JSON: {what} at column {error.colno}{rule}") from None
    except RecursionError:
        raise DataError(f"{path}:{first_line}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # Python reads no integer of thousands of digits
        raise DataError(f"{path}:{first_line}: not usable JSON: {error}") from None


def _row_groups(path: Path) -> Iterator[Piece]:
    import pyarrow.parquet as pq  # a tenth of a second, and most datasets are JSON

    with reading_as("a Parquet", path):
        metadata = pq.read_metadata(path)
    first = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size_bytes, num_rows = group.total_byte_size, group.num_rows
        whole = Piece(path=path, kind="row group", first=first, begin=number, size_bytes=size_bytes, num_rows=num_rows)
        yield from whole.parts()
        first += num_rows


def _parquet_rows(piece: Piece, choose: ChooseColumns) -> Iterator[tuple[str, object]]:
    import pyarrow.parquet as pq

    with reading_as("a Parquet", piece.path), pq.ParquetFile(piece.path) as file:
        assert piece.num_rows is not None
        columns = chosen_columns(piece.path, file.schema_arrow.names, choose)
        at, end = 0, piece.skip + piece.num_rows  # rows of the group
        for batch in file.iter_batches(batch_size=_DECODED, row_groups=[piece.begin], columns=columns):
            skipped = max(0, piece.skip - at)
            mine = batch.slice(skipped, max(0, end - at - skipped))
            yield from objects_of(piece.path, mine, first=piece.first + at + skipped - piece.skip)
            at += batch.num_rows
            if at >= end:
                return
