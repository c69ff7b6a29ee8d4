"""Keeps what was answered to each question: a file of each evaluation, and one that grows while questions are asked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kdmesh.errors import CheckpointError
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.questions.scores import Answered
from kdmesh_trainer.saving.files import sync, write_synced

_NAME = "step-{:08d}.jsonl"


class AnswerFiles:
    """A directory with a file for each evaluation."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, done: int, questions: Sequence[Question], answered: Sequence[Answered]) -> None:
        """Write those of the student after `done` steps; what an earlier attempt left of later ones is removed.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = self._directory / _NAME.format(done)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for later in self._directory.glob(_NAME.replace("{:08d}", "*")):
                if later.name > path.name:
                    later.unlink()
        except OSError as error:
            raise CheckpointError(f"the answers {path} cannot be written: {error}") from error
        write_answers(path, questions, answered)


def write_answers(path: Path, questions: Sequence[Question], answered: Sequence[Answered]) -> None:
    """A JSON object for each question, in their order: what was asked, what is right, and every response.

    Raises:
        CheckpointError: it cannot be written; an older file at `path` is untouched.
    """
    lines = [_line(question, each) for question, each in zip(questions, answered, strict=True)]
    part = path.with_name(f"{path.name}.part")
    try:
        write_synced(part, "".join(lines))
        os.replace(part, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise CheckpointError(f"the answers {path} cannot be written: {error}") from error


class EarlyAnswers:
    """A file with a line for each question that has all its answers so far, in the order in which they had."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0  # of questions
        self._size_bytes = 0

    def add(self, question: Question, answered: Answered) -> None:
        """Write one more; the first replaces what an earlier command left there.

        Raises:
            CheckpointError: it cannot be written; the lines before it are there.
        """
        line = _line(question, answered).encode()
        try:
            with self.path.open("ab" if self.number else "wb") as file:
                file.write(line)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, self._size_bytes)
            raise CheckpointError(f"the answers {self.path} cannot be written: {error}") from error
        self.number += 1
        self._size_bytes += len(line)

    def remove(self) -> None:
        """They are elsewhere."""
        if self.number:
            self.path.unlink(missing_ok=True)


def _line(question: Question, answered: Answered) -> str:
    """As JSON, with its end; half a surrogate pair, which a grader may say, is the escape that it is in JSON."""
    text = json.dumps(_entry(question, answered), ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode() + "\n"


def _entry(question: Question, answered: Answered) -> dict[str, object]:
    return {
        "question": question.chat.origin,
        "asked": question.chat.messages[-1].content,
        "answers": list(question.answers),
        "right": answered.num_right,
        "responses": [
            {
                "text": response.text,
                "is_right": response.is_right,
                "is_cut_off": response.is_cut_off,
                "tokens": response.num_tokens,
                **({"grader_error": response.error} if response.error else {}),
            }
            for response in answered.responses
        ],
    }
