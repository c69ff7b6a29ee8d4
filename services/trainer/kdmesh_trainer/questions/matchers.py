"""Says whether a response is right."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import assert_never

from kdmesh.errors import ConfigError, DataError
from kdmesh.extension import resolve
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.sections.questions_config import (
    Contains,
    CustomMatch,
    ExactMatch,
    LastNumber,
    MatchConfig,
    RegexMatch,
)

# (a response's text, what was asked) -> whether it is right. Only a custom one raises.
Matcher = Callable[[str, Question], bool]

# With commas between thousands or without. A minus sign after a letter, a digit or a bracket is an operator, and an
# exponent of more digits is no number that anybody means.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?",
    re.ASCII,
)


def build_matcher(cfg: MatchConfig, *, key: str = "evaluation.questions.match") -> Matcher:
    """The matcher that `cfg`, the configuration's `key`, names.

    Raises:
        ConfigError: a custom one cannot be found, or called in the way that is said.
    """
    match cfg:
        case ExactMatch():
            return partial(_any_answer, partial(_is_equal, ignore_case=cfg.ignore_case))
        case Contains():
            return partial(_any_answer, partial(_contains, ignore_case=cfg.ignore_case))
        case LastNumber():
            return partial(_any_answer, _has_same_number)
        case RegexMatch():
            flags = re.IGNORECASE if cfg.ignore_case else re.NOFLAG
            found = partial(_is_found, re.compile(cfg.pattern, flags), ignore_case=cfg.ignore_case)
            return partial(_any_answer, found)
        case CustomMatch():
            return _custom(cfg, key)
        case _:
            assert_never(cfg)


def refuse_unfit_answers(cfg: MatchConfig, questions: Sequence[Question]) -> None:
    """Raises DataError for the first question whose answer no response could match."""
    if not isinstance(cfg, LastNumber):
        return
    for question in questions:
        for answer in question.answers:
            if last_number(answer) is None:
                raise DataError(
                    f"{question.chat.origin}: the answer {answer[:80]!r} holds no number, which match last_number needs"
                )


def last_number(text: str) -> Decimal | None:
    """The value of the last number that is written in digits; None where there is none."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def _any_answer(is_match: Callable[[str, str], bool], response: str, question: Question) -> bool:
    return any(is_match(response, answer) for answer in question.answers)


def _is_equal(response: str, answer: str, *, ignore_case: bool) -> bool:
    return _plain(response, ignore_case) == _plain(answer, ignore_case)


def _contains(response: str, answer: str, *, ignore_case: bool) -> bool:
    return _plain(answer, ignore_case) in _plain(response, ignore_case)


def _has_same_number(response: str, answer: str) -> bool:
    value = last_number(response)
    return value is not None and value == last_number(answer)


def _is_found(pattern: re.Pattern[str], response: str, answer: str, *, ignore_case: bool) -> bool:
    matches = list(pattern.finditer(response))
    if not matches:
        return False
    found: str | None = matches[-1][1] if pattern.groups else matches[-1][0]
    return found is not None and _is_equal(found, answer, ignore_case=ignore_case)


def _plain(text: str, ignore_case: bool) -> str:
    return text.strip().casefold() if ignore_case else text.strip()


def _custom(cfg: CustomMatch, key: str) -> Matcher:
    try:
        function = resolve(cfg.target, cfg.params, num_arguments=2)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None

    def is_right(response: str, question: Question) -> bool:
        # A copy of all of it: the next response to the question is graded by the row as it was.
        verdict = function(response, copy.deepcopy(dict(question.row)))
        if not isinstance(verdict, bool):
            raise TypeError(f"{cfg.target} returned {verdict!r}; it must return True or False")
        return verdict

    return is_right
