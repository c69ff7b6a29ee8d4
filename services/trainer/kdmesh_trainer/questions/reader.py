"""Reads questions with their answers from a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdmesh.chats.chat_rows import TEXT_ALONE, Chat, chat_from_row, columns_found, unicode_text
from kdmesh.chats.image_files import ImageColumn
from kdmesh.errors import DataError
from kdmesh_trainer.data.encoding.chat import without_answers
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.sections.questions_config import QuestionsConfig


def read_questions(cfg: QuestionsConfig, *, images: ImageColumn = TEXT_ALONE) -> list[Question]:
    """All questions, in the file's order; at least one.

    Args:
        images: where those in messages are found.

    Raises:
        DataError: the file or a row cannot be used; the message names the line, what was found and the rule.
    """
    questions: list[Question] = []
    try:
        # utf-8-sig: a byte order mark is not part of the first line.
        with cfg.path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if len(questions) == cfg.limit:
                    break
                if line.strip():
                    questions.append(_question(line, cfg, f"{cfg.path}:{number}", images))
    except OSError as error:
        raise DataError(f"cannot read evaluation.questions.path {cfg.path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{cfg.path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not questions:
        raise DataError(f"{cfg.path} holds no question")
    return questions


def _question(line: str, cfg: QuestionsConfig, origin: str, images: ImageColumn) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, or an integer too long or a nesting too deep for Python
        raise DataError(f"{origin}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{origin}: a row must be an object, not {type(row).__name__}")
    chat = _chat(row, cfg, origin, images)
    messages = chat.messages
    asked = without_answers(messages)
    if not asked:
        raise DataError(f"{origin}: there is no turn to answer")
    if cfg.answer is not None:
        answers = answers_in(_column(row, cfg.answer, "answer", origin), f"{origin}: {cfg.answer}")
    elif len(asked) < len(messages):
        answers = answers_in(messages[-1].content, f"{origin}: {cfg.messages}[-1]")
    else:
        raise DataError(
            f"{origin}: {cfg.messages} ends with a turn of the {messages[-1].role}, and evaluation.questions.answer "
            "is null: the last turn must be the assistant's, which is then the answer"
        )
    return Question(chat=replace(chat, messages=asked), answers=answers, row=row)


def _chat(row: Mapping[str, Any], cfg: QuestionsConfig, origin: str, images: ImageColumn) -> Chat:
    if cfg.messages is not None:
        _column(row, cfg.messages, "messages", origin)
        return chat_from_row(row, column=cfg.messages, origin=origin, images=images)
    text = _column(row, cfg.question, "question", origin)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{origin}: {cfg.question} must be a text that is not blank")
    turns = [{"role": "user", "content": text}]
    return chat_from_row({**row, cfg.question: turns}, column=cfg.question, origin=origin, images=images)


def _column(row: Mapping[str, Any], name: str, key: str, origin: str) -> Any:
    if row.get(name) is None:
        raise DataError(
            f"{origin}: no column {name!r}, which evaluation.questions.{key} names; columns found: {columns_found(row)}"
        )
    return row[name]


def answers_in(value: object, origin: str) -> tuple[str, ...]:
    """Of which any is right: a text, a number or a list of these. Raises DataError when it is neither, or blank."""
    values = value if isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            raise DataError(f"{origin} must be a text, a number or a list of these, not {type(each).__name__}")
    answers = tuple(unicode_text(str(each), origin) for each in values)
    if not answers or not all(answer.strip() for answer in answers):
        raise DataError(f"{origin} is blank; a question needs an answer")
    return answers
