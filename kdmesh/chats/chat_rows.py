"""Turns one row of a file into a chat, whichever of the usual forms it has, or into a plain text."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from kdmesh.chats.image_files import ImageColumn, ImageSource, NoImages, RowImages
from kdmesh.chats.tool_rows import TOOLS_COLUMN, Tool, answer_keys, calls_of, tools_of
from kdmesh.errors import DataError
from kdmesh.types import Image

# They change what a template renders: a row that has one is refused.
_UNSUPPORTED_COLUMNS = ("functions", "chat_template_kwargs")

CHAT_COLUMNS = (
    *("conversations", "instruction", "input", "output", "system", "history", TOOLS_COLUMN),
    *_UNSUPPORTED_COLUMNS,
)
"""Columns that ShareGPT and Alpaca rows are made of, and those that are heeded in any row."""

ASSISTANTS = ("assistant", "gpt")
"""What a turn of the assistant is called, in a message's `role` or `from`."""

_NOTHING: tuple[object, ...] = (None, "", [], {}, "[]", "{}", "null")  # a column may hold JSON as a text

_TEXT = "text"  # no row can name it
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# They change what the template renders or what carries loss: ignoring them would train on something else.
_UNSUPPORTED_KEYS = ("function_call", "train_detail")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_GREATEST_WEIGHT = 1e300  # with room for the sum of a step's
# By which formats say whether a turn carries loss.
_TRAINED_KEYS = ("train", "training", "loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn."""

    role: str  # one of system, developer, user, assistant, tool; "text" of a plain one
    content: str  # its text
    parts: tuple[str | Image, ...] = ()  # its text and images in order; empty: it is text alone
    is_trained: bool = True  # whether it carries loss, if it is the assistant's
    reasoning: str = ""  # what the assistant thought before it, which the template writes; empty: nothing is told
    tool_calls: tuple[Tool, ...] = ()  # of the assistant, behind its text
    answer_to: Mapping[str, str] = field(default_factory=dict)  # of a tool: what tells which call it answers

    @property
    def images(self) -> tuple[Image, ...]:
        """In their order."""
        return tuple(part for part in self.parts if isinstance(part, Image))

    def for_template(self) -> dict[str, object]:
        """As chat templates want it; what it does not have is no key of it."""
        parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in self.parts]
        # By the names that templates know it by: most by the first, gpt-oss's by the second.
        reasoning = dict.fromkeys(("reasoning_content", "thinking"), self.reasoning) if self.reasoning else {}
        calls = {"tool_calls": [dict(call) for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": self.role, "content": parts or self.content, **reasoning, **calls, **self.answer_to}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation, or a plain text, and where it was read."""

    messages: tuple[Message, ...]  # at least one; of a plain text the only one
    origin: str  # "file:line", for people
    teacher_messages: tuple[Message, ...] = ()  # what leads up to the same response for the teacher; empty: no column
    teacher_name: str = ""  # of the one that is asked; empty: no column
    tools: tuple[Tool, ...] = ()  # that the assistant may call
    weight: float = 1.0  # of its loss, finite, >= 0
    row: Mapping[str, Any] | None = None  # all that was read of it; None: nobody wants it
    lacks: str = ""  # the column of the answer, where its row is a prompt without one

    @property
    def text(self) -> str | None:
        """The plain text that it is; None: it is a conversation."""
        first = self.messages[0]
        return first.content if first.role == _TEXT else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherColumns:
    """What a row says of its teacher, beside its chat."""

    messages: str | None = None  # column of messages for the teacher; None: there is none
    name: str | None = None  # column of the teacher's name; None: there is none
    known_names: tuple[str, ...] = ()


NO_COLUMNS = TeacherColumns()


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerColumns:
    """Where a row has a question and its answer, if it is made of the two."""

    prompt: str = "prompt"  # a text, or messages
    completion: str = "completion"  # likewise; a row without one ends with its prompt
    comes_first: bool = False  # whether a row that has them is read so, whatever else it has


PROMPT_AND_COMPLETION = AnswerColumns()

TEXT_ALONE = ImageColumn(source=NoImages("this dataset is read as text alone"), name=None)


def chat_from_row(
    row: object,
    *,
    column: str,
    origin: str,
    answers: AnswerColumns = PROMPT_AND_COMPLETION,
    teacher: TeacherColumns = NO_COLUMNS,
    images: ImageColumn = TEXT_ALONE,
    weight: str | None = None,
) -> Chat:
    """The chat in a row: OpenAI messages (or ShareGPT ones) in `column`, else ShareGPT, else Alpaca, else `answers`.

    Where `answers` come first, they do.

    A text in the row's `system` is its first turn, whichever form it has.

    Args:
        weight: column of its weight; None: it is 1.

    Raises:
        DataError: it is none of these, has what is not supported, or lacks what `teacher` or `weight` names; the
            message names the origin, what was found and the rule.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: a row must be an object, not {_kind(row)}")
    _refuse_unsupported_columns(row, origin)
    found_images = RowImages(images, row, origin)
    lacks = ""
    if answers.comes_first and row.get(answers.prompt) is not None:
        messages, lacks = _prompt_and_completion(row, answers, origin, found_images)
    elif row.get(column) is not None:
        messages = _messages(row[column], f"{origin}: {column}", found_images)
    elif row.get("conversations") is not None:
        messages = _messages(row["conversations"], f"{origin}: conversations", found_images)
    elif row.get("instruction") is not None and row.get("output") is not None:
        messages = _alpaca_messages(row, origin)
    elif row.get(answers.prompt) is not None:
        messages, lacks = _prompt_and_completion(row, answers, origin, found_images)
    else:
        hint = "; to train on plain text: `format: text`" if isinstance(row.get("text"), str) else ""
        raise DataError(
            f"{origin}: no column {column!r}, and neither `conversations` (ShareGPT), `instruction` with `output` "
            f"(Alpaca) nor {answers.prompt!r}; columns found: {columns_found(row)}{hint}"
        )
    found_images.check_all_used()
    return Chat(
        messages=(*_system(row, messages, origin), *messages),
        origin=origin,
        teacher_messages=()
        if teacher.messages is None
        else tuple(_teacher_messages(row, teacher.messages, origin, RowImages(images, row, origin))),
        teacher_name="" if teacher.name is None else _teacher_name(row, teacher.name, teacher.known_names, origin),
        tools=tools_of(row, origin),
        weight=1.0 if weight is None else _weight(row, weight, origin),
        lacks=lacks,
    )


def text_from_row(
    row: object, *, column: str, origin: str, teacher: TeacherColumns = NO_COLUMNS, weight: str | None = None
) -> Chat:
    """The plain text in `column` of a row. Raises DataError as chat_from_row."""
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: a row must be an object, not {_kind(row)}")
    if row.get(column) is None:
        raise DataError(f"{origin}: no column {column!r} with a text; columns found: {columns_found(row)}")
    message = Message(role=_TEXT, content=_text(row[column], f"{origin}: {column}"))
    name = "" if teacher.name is None else _teacher_name(row, teacher.name, teacher.known_names, origin)
    own = 1.0 if weight is None else _weight(row, weight, origin)
    return Chat(messages=(message,), origin=origin, teacher_name=name, weight=own)


def chat_from_messages(value: object, *, origin: str, images: ImageSource = TEXT_ALONE.source) -> Chat:
    """The chat in a list of {role, content} or {from, value}.

    Raises:
        DataError: as chat_from_row.
    """
    found = RowImages(ImageColumn(source=images, name=None), {}, origin)
    return Chat(messages=tuple(_messages(value, origin, found)), origin=origin)


def columns_found(row: Mapping[Any, Any]) -> str:
    """The names of a row's columns, for people."""
    return ", ".join(f"{name} (null)" if value is None else str(name) for name, value in row.items()) or "none"


def unicode_text(text: str, origin: str) -> str:
    """The same text, which no file can hold otherwise. Raises DataError where it holds half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{origin} is not Unicode text: half a surrogate pair at character {error.start}") from None
    return text


def _refuse_unsupported_columns(row: Mapping[Any, Any], origin: str) -> None:
    for name in _UNSUPPORTED_COLUMNS:
        value = row.get(name) or None
        # Of Parquet every row has all keys of a column that holds objects.
        if any(each not in _NOTHING for each in (value.values() if isinstance(value, Mapping) else [value])):
            raise DataError(f"{origin}: `{name}` is not supported; a chat is messages and `{TOOLS_COLUMN}`")


def _teacher_messages(row: Mapping[Any, Any], column: str, origin: str, images: RowImages) -> list[Message]:
    if row.get(column) is None:
        raise DataError(f"{origin}: no column {column!r}, which data.teacher_context names")
    return _messages(row[column], f"{origin}: {column}", images)


def _teacher_name(row: Mapping[Any, Any], column: str, known: tuple[str, ...], origin: str) -> str:
    name = row.get(column)
    if name is None:
        raise DataError(f"{origin}: no column {column!r}, which data.teacher_column names; known: {', '.join(known)}")
    if name not in known:
        raise DataError(f"{origin}: {column}: there is no teacher {name!r}; known: {', '.join(known)}")
    return str(name)


def _weight(row: Mapping[Any, Any], column: str, origin: str) -> float:
    value = row.get(column)
    if value is None:
        raise DataError(
            f"{origin}: no column {column!r}, which weight_column names; columns found: {columns_found(row)}"
        )
    if isinstance(value, str):  # as all that a CSV file holds
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{origin}: {column} is {value!r}; a weight must be a number, not {_kind(value)}")
    if not 0 <= value < math.inf:
        raise DataError(f"{origin}: {column} is {value}; a weight must be finite and not negative")
    if value > _GREATEST_WEIGHT:
        shown = f"{min(value, sys.float_info.max):g}"
        raise DataError(f"{origin}: {column} is {shown}; a weight must be at most {_GREATEST_WEIGHT:g}")
    return float(value)


def _messages(value: object, origin: str, images: RowImages) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{origin} must be a list of messages, not {_kind(value)}")
    if not value:
        raise DataError(f"{origin} has no message")
    return [_message(item, f"{origin}[{number}]", images) for number, item in enumerate(value)]


def _message(value: object, origin: str, images: RowImages) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{origin}: a message must be an object, not {_kind(value)}")
    _refuse_unsupported_keys(value, origin)
    role_key, content_key = ("role", "content") if value.get("role") is not None else ("from", "value")
    role = value.get(role_key)
    if role is None:
        raise DataError(f"{origin}: no `role` (or `from`); keys found: {', '.join(map(str, value)) or 'none'}")
    calls = calls_of(value, str(role), origin)
    if value.get(content_key) is None and not calls:
        raise DataError(f"{origin}: `{content_key}` is missing or null; keys found: {', '.join(map(str, value))}")
    roles = {name: name for name in _ROLES} if role_key == "role" else _SHAREGPT_ROLES
    if not isinstance(role, str) or role not in roles:
        raise DataError(f"{origin}: unknown role {role!r}; known: {', '.join(roles)}")
    content, where = "" if value.get(content_key) is None else value[content_key], f"{origin}.{content_key}"
    said = Message(
        role=roles[role],
        content="",
        is_trained=_is_trained(value, roles[role], origin),
        reasoning=_reasoning(value, roles[role], origin),
        tool_calls=calls,
        answer_to=answer_keys(value, roles[role], origin),
    )
    if not isinstance(content, list | tuple):
        return replace(said, content=_text(content, where))
    parts = tuple(_part(part, f"{where}[{number}]", images) for number, part in enumerate(content))
    has_images = any(isinstance(part, Image) for part in parts)
    if has_images and roles[role] == "assistant":
        raise DataError(f"{where}: an assistant's turn is text, and cannot hold an image")
    text = "".join(part for part in parts if isinstance(part, str))
    return replace(said, content=text, parts=parts if has_images else ())


def _refuse_unsupported_keys(message: Mapping[Any, Any], origin: str) -> None:
    for key in _UNSUPPORTED_KEYS:
        if message.get(key):
            raise DataError(f"{origin}: {key!r} is not supported; a message is a role, a text, its reasoning and calls")


def _reasoning(message: Mapping[Any, Any], role: str, origin: str) -> str:
    """What the assistant thought; empty where nothing is told."""
    keys = [key for key in _REASONING_KEYS if message.get(key)]
    if not keys:
        return ""
    if len(keys) > 1:
        raise DataError(f"{origin}: {' and '.join(keys)} both hold reasoning; a message has it once")
    if role != "assistant":
        raise DataError(f"{origin}: {keys[0]!r} at a turn of the {role}; only the assistant's has one")
    return _text(message[keys[0]], f"{origin}.{keys[0]}")


def _is_trained(message: Mapping[Any, Any], role: str, origin: str) -> bool:
    """Whether a turn carries loss, as its `weight` (OpenAI) and `train`, `training` or `loss` say."""
    weight, said = message.get("weight"), {key: message[key] for key in _TRAINED_KEYS if message.get(key) is not None}
    if weight not in (None, "", 0, 1):
        raise DataError(f"{origin}: 'weight' is {weight!r}; a turn of the assistant is trained on, 1, or is not, 0")
    for key, is_trained in said.items():
        if not isinstance(is_trained, bool):
            raise DataError(f"{origin}: {key!r} is {is_trained!r}; it must be true or false")
        if is_trained and role != "assistant":
            raise DataError(f"{origin}: {key!r} is true, and a turn of the {role} is never trained on")
    return weight != 0 and all(said.values())


def _text(value: object, origin: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin} must be a string, not {_kind(value)}")
    return unicode_text(value, origin)


def _part(part: object, origin: str, images: RowImages) -> str | Image:
    if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
        return images.of_part(part, origin)
    if not isinstance(part, Mapping) or part.get("type") != "text":
        shown = repr(part.get("type")) if isinstance(part, Mapping) else _kind(part)
        raise DataError(f"{origin}: only parts of type 'text' and 'image' are supported, not {shown}")
    if not isinstance(part.get("text"), str):
        raise DataError(f"{origin}.text must be a string, not {_kind(part.get('text'))}")
    return _text(part["text"], f"{origin}.text")


def _system(row: Mapping[Any, Any], messages: Sequence[Message], origin: str) -> list[Message]:
    """The system turn that a row keeps in a column of its own, if it has one that is not among its messages."""
    text = row.get("system") or ""
    if not isinstance(text, str):
        raise DataError(f"{origin}: system must be a string, not {_kind(text)}")
    if not text or (messages[0].role, messages[0].content) == ("system", text):
        return []
    if any(message.role in ("system", "developer") for message in messages):
        raise DataError(f"{origin}: both `system` and the messages hold a system turn; a chat has one")
    return [Message(role="system", content=unicode_text(text, f"{origin}: system"))]


def _alpaca_messages(row: Mapping[Any, Any], origin: str) -> list[Message]:
    if row.get("history"):
        raise DataError(f"{origin}: `history` of Alpaca rows is not supported; use messages")
    instruction = _text(row["instruction"], f"{origin}: instruction")
    further = _text(row.get("input") or "", f"{origin}: input")
    answer = _text(row["output"], f"{origin}: output")
    question = f"{instruction}\n\n{further}" if further else instruction
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


def _prompt_and_completion(
    row: Mapping[Any, Any], columns: AnswerColumns, origin: str, images: RowImages
) -> tuple[list[Message], str]:
    """The turns, and the column of the completion where there is none."""

    def turns(name: str, role: str) -> list[Message]:
        value, where = row.get(name), f"{origin}: {name}"
        if value is None:
            return []
        if isinstance(value, list | tuple):
            return _messages(value, where, images)
        return [Message(role=role, content=_text(value, where))]

    asked = [replace(message, is_trained=False) for message in turns(columns.prompt, "user")]
    answer = turns(columns.completion, "assistant")
    return [*asked, *answer], "" if answer else columns.completion


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
