"""Grades what is answered to questions, whoever answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from kdmesh.chats.image_files import ImageColumn
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.questions.matchers import Matcher, build_matcher, refuse_unfit_answers
from kdmesh_trainer.questions.reader import read_questions
from kdmesh_trainer.questions.scores import Answered, Response
from kdmesh_trainer.sections.questions_config import QuestionsConfig

log = logging.getLogger(__name__)

KeepAnswers = Callable[[int, Sequence[Question], Sequence[Answered]], None]
"""Takes steps done, the questions, and what was answered to each."""

TakeAnswered = Callable[[Question, Answered], None]
"""Takes a question that has all its answers, and them; raises CheckpointError where they cannot be kept."""


def read_graded(cfg: QuestionsConfig, images: ImageColumn) -> tuple[list[Question], Matcher]:
    """The questions, and what says whether a response to one is right.

    Args:
        images: where those of the questions are found.

    Raises:
        ConfigError: a grader cannot be found or called.
        DataError: a question cannot be used, or no response could match its answer.
    """
    is_right = build_matcher(cfg.match)
    questions = read_questions(cfg, images=images)
    refuse_unfit_answers(cfg.match, questions)
    return questions, is_right


def graded(is_right: Matcher, question: Question, text: str, *, is_cut_off: bool, num_tokens: int) -> Response:
    """The response that says `text`."""
    right, error = False, ""
    try:
        right = is_right(text, question)
    except (Exception, SystemExit) as failure:  # noqa: BLE001 - a grader of the user's own must not end a run
        error = f"{type(failure).__name__}: {failure}"
    return Response(text=text, is_right=right, is_cut_off=is_cut_off, num_tokens=num_tokens, error=error)


def tell_of_errors(questions: Sequence[Question], answered: Sequence[Answered]) -> None:
    """Say on how many responses the grader failed, and why on the first."""
    failed = [(each.number, response) for each in answered for response in each.responses if response.error]
    if failed:
        number, response = failed[0]
        facts = {"responses": len(failed), "question": questions[number].chat.origin, "why": response.error}
        log.warning("the grader failed, so these answers count as wrong", extra=facts)
