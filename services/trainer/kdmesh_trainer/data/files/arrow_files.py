"""Rows of Arrow files, as `datasets` saves them (streams of messages) and as others do (files with an index)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdmesh.errors import DataError
from kdmesh_trainer.data.files.piece import PIECE_BYTES, ChooseColumns, Piece, reading
from kdmesh_trainer.data.files.table_rows import chosen_columns, objects_of, reading_as

_MAGIC = b"ARROW1"
_AS_OBJECTS = 1024  # rows at a time, which take many times their bytes then
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def saved_files(directory: Path) -> tuple[Path, ...] | None:
    """The files of a dataset that `save_to_disk` of the package datasets wrote, in its order; None: it is none.

    Raises:
        DataError: it holds several splits, a cache of several datasets, or what names its files is damaged.
    """
    if (directory / _SPLITS).is_file():
        found = ", ".join(sorted(path.parent.name for path in directory.glob(f"*/{_STATE}"))) or "none"
        raise DataError(f"{directory} holds splits of a dataset; name the directory of one of them: {found}")
    if not (directory / _STATE).is_file():
        if (directory / _INFO).is_file() and any(directory.glob("*.arrow")):
            raise DataError(f"{directory} has {_INFO} without {_STATE}: it is a cache; name one of its .arrow files")
        return None
    with reading(directory / _STATE):
        text = (directory / _STATE).read_bytes()
    try:
        state = json.loads(text)
        files = tuple(directory / each["filename"] for each in state["_data_files"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{directory / _STATE} does not name the files of a dataset: {error!r}") from error
    if state.get("_indices_data_files"):
        raise DataError(f"{directory} holds a choice of rows apart from its files; save it anew by datasets 2 or later")
    for file in files:
        if not file.is_file():
            raise DataError(f"{directory / _STATE} names {file.name}, and there is no such file")
    return files


def arrow_pieces(path: Path) -> Iterator[Piece]:
    """All of a file, batch by batch, small ones of a stream together. Raises DataError when it is no Arrow file."""
    import pyarrow as pa

    with _mapped(path) as source:
        if source.read(len(_MAGIC)) == _MAGIC:
            file, first = pa.ipc.open_file(source), 1
            for number in range(file.num_record_batches):
                batch = file.get_batch(number)
                size_bytes = batch.get_total_buffer_size()  # nbytes looks into the batch, which may be damaged
                num_rows = batch.num_rows
                whole = Piece(
                    path=path, kind="batch", first=first, begin=number, size_bytes=size_bytes, num_rows=num_rows
                )
                yield from whole.parts()
                first += num_rows
            return
        schema = _schema(path, source)
        begin, first, num_rows = source.tell(), 1, 0
        for batch in _batches(source, schema, end=None):
            num_rows += batch.num_rows
            if source.tell() - begin >= PIECE_BYTES:
                yield Piece(path=path, kind="messages", first=first, begin=begin, size_bytes=source.tell() - begin)
                begin, first, num_rows = source.tell(), first + num_rows, 0
        if num_rows:
            yield Piece(path=path, kind="messages", first=first, begin=begin, size_bytes=source.tell() - begin)


def arrow_rows(piece: Piece, choose: ChooseColumns) -> Iterator[tuple[str, object]]:
    """Each row of a piece after its origin."""
    import pyarrow as pa

    number = piece.first
    with _mapped(piece.path) as source:
        if piece.kind == "batch":
            batches: Iterator[Any] = iter([pa.ipc.open_file(source).get_batch(piece.begin)])
            batches = (batch.slice(piece.skip, piece.num_rows) for batch in batches)
        else:
            schema = _schema(piece.path, source)
            source.seek(piece.begin)
            batches = _batches(source, schema, end=piece.begin + piece.size_bytes)
        for batch in batches:
            chosen = batch.select(chosen_columns(piece.path, batch.schema.names, choose))
            _check(chosen, f"{piece.path}: rows {number} to {number + batch.num_rows - 1}")
            for begin in range(0, batch.num_rows, _AS_OBJECTS):
                yield from objects_of(piece.path, chosen.slice(begin, _AS_OBJECTS), first=number + begin)
            number += batch.num_rows


def _check(batch: Any, origin: str) -> None:
    """Raises DataError when it is damaged: pyarrow follows lengths and places as the file has them, to anywhere."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{origin} are damaged, or no UTF-8: {error}") from None


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with reading_as("an Arrow", path), pa.memory_map(str(path)) as source:
        yield source


def _schema(path: Path, source: Any) -> Any:
    """That of a stream, which is read up to its first batch."""
    import pyarrow as pa

    source.seek(0)
    schema = pa.ipc.open_stream(source).schema
    for field in schema:
        if pa.types.is_dictionary(field.type):
            raise DataError(f"{path}: column {field.name} is dictionary-encoded; write it as plain values")
    return schema


def _batches(source: Any, schema: Any, *, end: int | None) -> Iterator[Any]:
    """From where the stream is, up to byte `end`; None: to its end."""
    import pyarrow as pa

    while end is None or source.tell() < end:
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            return
        yield pa.ipc.read_record_batch(message, schema)
