"""Reads the chats that a served model shall answer from a JSONL file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdmesh.chat_rows import refuse_unsupported_columns, system_text, unicode_text
from kdmesh.errors import DataError
from kdmesh.image_files import ImageColumn, RowImages
from kdmesh.types import Image

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A row's chat up to what the assistant shall answer."""

    origin: str  # "FILE, line N", for people
    messages: list[Message]  # as the row has them
    shown: list[Message]  # as the template takes them: an image is a part that names none
    images: tuple[Image, ...]  # in their order
    column: dict[str, Any]  # the row's column of images, if it has one


class Prompts:
    """The rows of a file, which is read once.

    A row has `messages`, whose last one is dropped when it is the assistant's, or `prompt`: a text for the user's turn,
    or messages.
    A text in its `system` is the first turn.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from None
        lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON may hold U+2028 as it is
        self._lines = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
        self.digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._lines)

    def rows(self, images: ImageColumn, *, begin: int = 0) -> Iterator[Asked]:
        """Those from row `begin` on.

        Raises:
            DataError: one is not JSON, has no turn to answer, or an image that is not to be had; the message names the
                line.
        """
        for place, line in self._lines[begin:]:
            yield _asked(line, place, images)


def _asked(line: str, place: str, images: ImageColumn) -> Asked:
    row, messages = _row(line, place)
    found = RowImages(images, row, place)
    pictures: list[Image] = []

    def shown(message: Message, number: int) -> Message:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        parts: list[object] = []
        for part in content:
            if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                pictures.append(found.of_part(part, f"{place}: messages[{number}]"))
                parts.append({"type": "image"})
            else:
                parts.append(part)
        return {**message, "content": parts}

    told = [shown(message, number) for number, message in enumerate(messages)]
    found.check_all_used()
    column = {images.name: row[images.name]} if images.name is not None and row.get(images.name) else {}
    return Asked(origin=place, messages=messages, shown=told, images=tuple(pictures), column=column)


def _row(line: str, place: str) -> tuple[dict[str, Any], list[Message]]:
    """A row, and its messages without an answer at their end."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, or an integer too long or a nesting too deep for Python
        raise DataError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place} is no object")
    refuse_unsupported_columns(row, place, takes_tools=False)
    messages = _turns(row, place)
    system = system_text(row, [(message.get("role"), message.get("content")) for message in messages], place)
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    for number, message in enumerate(messages):
        for text in _texts(message):
            unicode_text(text, f"{place}: messages[{number}]")
    return row, messages


def _texts(value: object) -> Iterator[str]:
    """Every text in a value of JSON, names included, however deep it lies."""
    left = [value]
    while left:
        match left.pop():
            case str() as text:
                yield text
            case list() as items:
                left += items
            case dict() as entries:
                left += [*entries, *entries.values()]


def _turns(row: dict[str, Any], place: str) -> list[Message]:
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        messages = prompt
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{place} has neither `messages`, a list of turns, nor `prompt`, a text or a list of turns")
    if messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(f"{place} has no turn to answer")
    return messages
