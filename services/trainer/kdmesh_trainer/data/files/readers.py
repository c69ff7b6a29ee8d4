"""Reads chats and plain texts from files, or chats from a reader of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from kdmesh.chats.chat_rows import (
    CHAT_COLUMNS,
    NO_COLUMNS,
    PROMPT_AND_COMPLETION,
    AnswerColumns,
    Chat,
    TeacherColumns,
    chat_from_messages,
    chat_from_row,
    columns_found,
    text_from_row,
)
from kdmesh.chats.image_files import ImageColumn, ImageSource, NoImages
from kdmesh.errors import DataError
from kdmesh.extension import resolve
from kdmesh_trainer.data.files.piece import ChooseColumns, Piece
from kdmesh_trainer.data.files.pieces import find_files, pieces_of, rows_of
from kdmesh_trainer.data.images import dataset_images
from kdmesh_trainer.sections.data_config import ChatFile, CustomDataset, DatasetConfig, ImagesConfig, TextFile

Reader = Callable[[], Iterator[Chat]]
"""Starts one pass over a dataset."""


# Enough for the tokenizer's threads, little enough that progress is seen to move. Of a long chat every turn is held as
# the template renders it, which takes many times its own text.
_CHATS_PER_CALL = 256
_CHARACTERS_PER_CALL = 4 * 2**20

TEXT_STUDENT = NoImages(
    "the student reads text alone: its model is of another kind, or has no preprocessor_config.json beside it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Where each row of a file has what."""

    chat: str
    answers: AnswerColumns
    teacher: TeacherColumns
    images: ImageColumn
    text: str | None = None  # of a plain text, of which each row is one; None: each is a chat
    weight: str | None = None  # of its loss; None: all count alike
    keeps_rows: bool = False  # whether each chat has its whole row
    named: tuple[str, ...] = ()  # some row must have each of them, lest a misspelt name goes unnoticed

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of a file's columns that are read."""
        if self.keeps_rows:
            return list(names)
        if self.text is not None:
            used = {self.text, self.teacher.name, self.weight}
            return [name for name in names if name in used] if self.text in names else list(names)
        if not {self.chat, "conversations", "instruction", self.answers.prompt} & set(names):
            return list(names)  # whole rows, so that the refusal can name their columns
        asked = (self.answers.prompt, self.answers.completion)
        named = (self.chat, *asked, self.teacher.messages, self.teacher.name, self.images.name, self.weight)
        used = {*named, *CHAT_COLUMNS}
        return [name for name in names if name in used]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFiles:
    """Files of chats, a Reader. Another process may be given it, and pieces of it."""

    name: str  # for people
    files: tuple[Path, ...]
    columns: Columns

    def __call__(self) -> Iterator[Chat]:
        """See Reader."""
        chats = (chat for piece in self.pieces() for chat in self.read(piece))
        return _not_empty(chats, self.name)

    def pieces(self) -> Iterator[Piece]:
        """All of the files. Raises DataError when one cannot be read, or no row has a column that is named."""
        self._refuse_absent_columns()
        return (piece for file in self.files for piece in pieces_of(file))

    def read(self, piece: Piece) -> Iterator[Chat]:
        """The chats of one piece. Raises DataError at the first row that cannot be used."""
        for origin, row in rows_of(piece, self.columns.chosen):
            chat = self._chat(row, origin)
            assert isinstance(row, Mapping)  # else there is no chat
            yield replace(chat, row=row) if self.columns.keeps_rows else chat

    def _refuse_absent_columns(self) -> None:
        named = self.columns.named
        absent = list(named)
        # Of tables no other columns, which nobody may be able to read, unless there are none of these.
        rows = self._rows(lambda names: [name for name in names if name in named] or list(names))
        while absent and (found := next(rows, None)) is not None:
            row = found[1] if isinstance(found[1], Mapping) else {}
            absent = [name for name in absent if name not in row]
        first = next(self._rows(list), None) if absent else None
        if first is not None and isinstance(first[1], Mapping):  # else there are no rows, or worse
            raise DataError(
                f"{self.name}: no row has a column {absent[0]!r}, as the configuration calls it; columns found in "
                f"{first[0]}: {columns_found(first[1])}"
            )

    def _rows(self, choose: ChooseColumns) -> Iterator[tuple[str, object]]:
        return (each for file in self.files for piece in pieces_of(file) for each in rows_of(piece, choose))

    def _chat(self, row: object, origin: str) -> Chat:
        columns = self.columns
        if columns.text is not None:
            return text_from_row(
                row, column=columns.text, origin=origin, teacher=columns.teacher, weight=columns.weight
            )
        return chat_from_row(
            row,
            column=columns.chat,
            origin=origin,
            answers=columns.answers,
            teacher=columns.teacher,
            images=columns.images,
            weight=columns.weight,
        )


def open_dataset(
    config: DatasetConfig,
    *,
    teacher: TeacherColumns = NO_COLUMNS,
    images: ImagesConfig | NoImages = TEXT_STUDENT,
    keeps_rows: bool = False,
) -> Reader:
    """The reader of a dataset; nothing of the data is read until it is called.

    The reader raises DataError at the first row it cannot use, naming file and line,
    and when there is no row at all.

    Args:
        teacher: columns of a file.
        images: how they are found, or why there are none.
        keeps_rows: each chat has the whole row that it was read from; one of a custom reader has its `messages`.

    Raises:
        ConfigError: a custom reader cannot be found or does not take its params.
        DataError: there is no such file, or it is of an unknown kind.
    """
    match config:
        case ChatFile() | TextFile():
            files = open_files(config, teacher=teacher, images=images)
            return replace(files, columns=replace(files.columns, keeps_rows=keeps_rows))
        case CustomDataset():
            function = resolve(config.target, config.params)
            source = _image_column(images, None).source
            return lambda: _not_empty(_read_custom(function, config.target, source, keeps_rows), config.target)
        case _:
            assert_never(config)


def open_files(
    config: ChatFile | TextFile, *, teacher: TeacherColumns = NO_COLUMNS, images: ImagesConfig | NoImages = TEXT_STUDENT
) -> ChatFiles:
    """The files of a dataset, of which nothing is read. Raises DataError when there are none of a known kind."""
    files = find_files(config.path)
    image_column = _image_column(images, files[0].parent)
    match config:
        case TextFile():
            columns = Columns(
                chat="",
                answers=PROMPT_AND_COMPLETION,
                teacher=teacher,
                images=image_column,
                text=config.column,
                weight=config.weight_column,
            )
        case ChatFile():
            answers = AnswerColumns(
                prompt=config.prompt_column,
                completion=config.completion_column,
                comes_first=config.names_answers,
            )
            columns = Columns(
                chat=config.column,
                answers=answers,
                teacher=teacher,
                images=image_column,
                weight=config.weight_column,
                named=config.named_columns,
            )
        case _:
            assert_never(config)
    return ChatFiles(name=str(config.path), files=files, columns=columns)


def groups_of(chats: Iterable[Chat]) -> Iterator[list[Chat]]:
    """The chats, so many at a time as are encoded together.

    A DataError comes behind all chats before it: whichever rule a row breaks, the first such row is told.
    """
    group: list[Chat] = []
    characters = 0
    try:
        for chat in chats:
            group.append(chat)
            characters += sum(len(message.content) for message in chat.messages)
            if len(group) == _CHATS_PER_CALL or characters >= _CHARACTERS_PER_CALL:
                yield group
                group, characters = [], 0
    except DataError:
        if group:
            yield group
        raise
    if group:
        yield group


def _image_column(cfg: ImagesConfig | NoImages, directory: Path | None) -> ImageColumn:
    if isinstance(cfg, NoImages):
        return ImageColumn(source=cfg, name=None)
    return ImageColumn(source=dataset_images(cfg, directory), name=cfg.column)


def _not_empty(chats: Iterable[Chat], name: str) -> Iterator[Chat]:
    is_empty = True
    for chat in chats:
        is_empty = False
        yield chat
    if is_empty:
        raise DataError(f"dataset {name} is empty")


def _read_custom(
    function: Callable[[], Iterable[object]], target: str, images: ImageSource, keeps_rows: bool
) -> Iterator[Chat]:
    chats = function()
    if not isinstance(chats, Iterable):
        raise DataError(f"{target} must return an iterable of chats, not {type(chats).__name__}")
    for number, messages in enumerate(chats, start=1):
        chat = chat_from_messages(messages, origin=f"{target}: chat {number}", images=images)
        yield replace(chat, row={"messages": messages}) if keeps_rows else chat
