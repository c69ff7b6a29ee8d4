"""Reads chats from files, or from a reader of the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, assert_never

from kdmesh.errors import DataError
from kdmesh.extension import resolve
from kdmesh_trainer.data_config import ChatFile, CustomDataset, DatasetConfig, ImagesConfig
from kdmesh_trainer.sources.images import DatasetImages, ImageSource, NoImages
from kdmesh_trainer.sources.rows import (
    CHAT_COLUMNS,
    NO_COLUMNS,
    Chat,
    ImageColumn,
    TeacherColumns,
    chat_from_messages,
    chat_from_row,
)

Reader = Callable[[], Iterator[Chat]]
"""Starts one pass over a dataset."""

_SUFFIXES = (".json", ".jsonl", ".parquet")


def open_dataset(
    config: DatasetConfig, *, teacher: TeacherColumns = NO_COLUMNS, images: ImagesConfig | None = None
) -> Reader:
    """The reader of a dataset; nothing of the data is read until it is called.

    The reader raises DataError at the first row it cannot use, naming file and line,
    and when there is no row at all.

    Args:
        teacher: columns of a file.
        images: how they are found; None refuses them.

    Raises:
        ConfigError: a custom reader cannot be found or does not take its params.
        DataError: there is no such file, or it is of an unknown kind.
    """
    match config:
        case ChatFile():
            files = _files(config.path)
            columns = _Columns(chat=config.column, teacher=teacher, images=_image_column(images, files[0].parent))
            return lambda: _not_empty(_read_files(files, columns), str(config.path))
        case CustomDataset():
            function = resolve(config.target, config.params)
            source = _image_column(images, None).source
            return lambda: _not_empty(_read_custom(function, config.target, source), config.target)
        case _:
            assert_never(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """Where each row of a file has what."""

    chat: str
    teacher: TeacherColumns
    images: ImageColumn


def _image_column(cfg: ImagesConfig | None, directory: Path | None) -> ImageColumn:
    if cfg is None:
        why = "the student reads text alone: its model is of another kind, or has no preprocessor_config.json beside it"
        return ImageColumn(source=NoImages(why), name=None)
    return ImageColumn(source=DatasetImages(cfg, directory), name=cfg.column)


def _files(path: Path) -> list[Path]:
    known = ", ".join(_SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"no dataset in directory {path}: it holds no file of the kinds {known}")
        return files
    if not path.is_file():
        raise DataError(f"no dataset at {path}: there is no such file or directory")
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path} is of an unknown kind; known: {known}")
    return [path]


def _not_empty(chats: Iterable[Chat], name: str) -> Iterator[Chat]:
    is_empty = True
    for chat in chats:
        is_empty = False
        yield chat
    if is_empty:
        raise DataError(f"dataset {name} is empty")


def _read_custom(function: Callable[[], Iterable[object]], target: str, images: ImageSource) -> Iterator[Chat]:
    chats = function()
    if not isinstance(chats, Iterable):
        raise DataError(f"{target} must return an iterable of chats, not {type(chats).__name__}")
    for number, messages in enumerate(chats, start=1):
        yield chat_from_messages(messages, origin=f"{target}: chat {number}", images=images)


def _read_files(files: list[Path], columns: _Columns) -> Iterator[Chat]:
    for path in files:
        for origin, row in _rows_of(path, columns):
            yield chat_from_row(row, column=columns.chat, origin=origin, teacher=columns.teacher, images=columns.images)


def _rows_of(path: Path, columns: _Columns) -> Iterator[tuple[str, object]]:
    """Each row of one file after its origin."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path, columns)
            return
        # utf-8-sig: a byte order mark is not part of the first line.
        with path.open(encoding="utf-8-sig") as file:
            yield from _json_rows(path, file) if path.suffix == ".json" else _json_lines(path, file)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error


def _json_lines(path: Path, file: IO[str]) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line.rstrip(), path, first_line=number)


def _json_rows(path: Path, file: IO[str]) -> Iterator[tuple[str, object]]:
    """One array of rows; a file of one object per line is taken too, because many are named so."""
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    file.seek(0)
    if first != "[":
        yield from _json_lines(path, file)
        return
    rows: Any = _parse(file.read(), path, first_line=1)
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row


def _parse(text: str, path: Path, *, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{path}:{first_line}: not usable JSON: nested too deeply") from None


def _parquet_rows(path: Path, columns: _Columns) -> Iterator[tuple[str, object]]:
    import pyarrow as pa  # a tenth of a second, and most datasets are JSON
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column, teacher = columns.chat, columns.teacher
            used = (column, teacher.messages, teacher.name, columns.images.name, *CHAT_COLUMNS)
            wanted = [name for name in names if name in used]
            number = 0
            if column not in names and "conversations" not in names and "instruction" not in names:
                wanted = names  # whole rows, so that the refusal can name their columns
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
