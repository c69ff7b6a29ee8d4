"""Reads the chats that a served model shall answer from a JSONL file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdmesh.chats.chat_rows import ASSISTANTS, Message, chat_from_row
from kdmesh.chats.image_files import ImageColumn
from kdmesh.chats.tool_rows import TOOLS_COLUMN, Tool
from kdmesh.errors import DataError
from kdmesh.types import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A row's chat up to what the assistant shall answer."""

    number: int  # of the row, from 0
    origin: str  # "FILE, line N", for people
    messages: list[dict[str, Any]]  # as the row has them
    turns: tuple[Message, ...]  # what they say
    tools: tuple[Tool, ...] = ()  # that the assistant may call
    columns: dict[str, Any] = field(default_factory=dict)  # the row's of images and of tools, if it has them

    @property
    def shown(self) -> list[dict[str, object]]:
        """The turns as the template takes them: an image is a part that names none."""
        return [turn.for_template() for turn in self.turns]

    @property
    def calls(self) -> tuple[Tool, ...]:
        """Of tools, that the assistant has made."""
        return tuple(call for turn in self.turns for call in turn.tool_calls)

    @property
    def images(self) -> tuple[Image, ...]:
        """In their order."""
        return tuple(image for turn in self.turns for image in turn.images)


class Prompts:
    """The rows of a file, which is read once.

    A row has `messages`, in which the assistant's at their end are dropped, or `prompt`, a text for the user's turn or
    messages. A text in its `system` is the first turn, and `tools` are shown to the model. What is asked is held to the
    rules of datasets: kdmesh.chats.chat_rows.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
        lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON may hold U+2028 as it is
        self._lines = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
        self.digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._lines)

    def rows(self, images: ImageColumn, *, without: Container[int] = ()) -> Iterator[Asked]:
        """All but those of the numbers in `without`.

        Raises:
            DataError: one is not JSON, has no turn to answer, a turn that no dataset may have, or an image that is not
                to be had; the message names the line.
        """
        for number, (place, line) in enumerate(self._lines):
            if number not in without:
                yield _asked(number, line, place, images)


def _asked(number: int, line: str, place: str, images: ImageColumn) -> Asked:
    row = _row(line, place)
    turns = _turns(row, place)
    chat = chat_from_row({**row, "messages": turns}, column="messages", origin=place, images=images)
    of_column = chat.messages[: len(chat.messages) - len(turns)]  # the system turn, if the row has one beside its turns
    return Asked(
        number=number,
        origin=place,
        messages=[*({"role": message.role, "content": message.content} for message in of_column), *turns],
        turns=chat.messages,
        tools=chat.tools,
        columns={name: row[name] for name in (images.name, TOOLS_COLUMN) if name is not None and row.get(name)},
    )


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, or an integer too long or a nesting too deep for Python
        raise DataError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place} is no object")
    return row


def _turns(row: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """The row's turns as it has them, without answers at their end: of `messages` first, as the trainer reads rows."""
    turns = row.get("messages")
    if turns is None:
        prompt = row.get("prompt")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{place} has neither `messages`, a list of turns, nor `prompt`, a text or a list of turns")
    while turns and (turns[-1].get("role") or turns[-1].get("from")) in ASSISTANTS:
        turns = turns[:-1]
    if not turns:
        raise DataError(f"{place} has no turn to answer")
    return turns
