"""Which responses are right, by every matcher."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.errors import ConfigError, DataError
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.questions.matchers import build_matcher, last_number, refuse_unfit_answers
from kdmesh_trainer.sections.questions_config import MatchConfig

CONFIG: TypeAdapter[MatchConfig] = TypeAdapter(MatchConfig)
HERE = "tests.unit.test_questions_matchers"


def question(*answers: str, **row: Any) -> Question:
    chat = Chat(messages=(Message(role="user", content="what?"),), origin="questions.jsonl:1")
    return Question(chat=chat, answers=answers, row=row)


def is_right(match: dict[str, Any], response: str, *answers: str) -> bool:
    return build_matcher(CONFIG.validate_python(match))(response, question(*answers))


BOXED = r"\\boxed\{(.+?)\}"


@pytest.mark.parametrize(
    ("match", "response", "answer", "expected"),
    [
        ({"name": "exact"}, " Paris\n", "Paris ", True),
        ({"name": "exact"}, "paris", "Paris", False),
        ({"name": "exact"}, "Paris.", "Paris", False),
        ({"name": "exact"}, "", "Paris", False),
        ({"name": "exact", "ignore_case": True}, "STRASSE", "straße", True),
        ({"name": "contains"}, "It is Paris, of course.", "Paris", True),
        ({"name": "contains"}, "It is 14", "4", True),
        ({"name": "contains"}, "It is paris", "Paris", False),
        ({"name": "contains", "ignore_case": True}, "It is paris", " Paris ", True),
        ({"name": "last_number"}, "First 3, then 1,200.0.", "so #### 1200", True),
        ({"name": "last_number"}, "It is 1200, not 7", "1200", False),
        ({"name": "last_number"}, "minus: \N{MINUS SIGN}5", "-5.00", True),
        ({"name": "last_number"}, "10-3", "3", True),
        ({"name": "last_number"}, "it is -3", "3", False),
        ({"name": "last_number"}, "(1, 2,3)", "3", True),
        ({"name": "last_number"}, "1.5e-3", "0.0015", True),
        ({"name": "last_number"}, "9e99999999999999999999", "9", False),
        ({"name": "last_number"}, "$.50", "0.5", True),
        ({"name": "last_number"}, "seven", "7", False),
        ({"name": "regex", "pattern": BOXED}, r"\boxed{1} or rather \boxed{ 42 }", "42", True),
        ({"name": "regex", "pattern": BOXED}, r"\boxed{42} or rather \boxed{1}", "42", False),
        ({"name": "regex", "pattern": BOXED}, "42", "42", False),
        ({"name": "regex", "pattern": "[A-D]"}, "not A but B", "B", True),
        ({"name": "regex", "pattern": "answer: (x)?"}, "answer: y", "x", False),
        ({"name": "regex", "pattern": "ANSWER: (.)", "ignore_case": True}, "answer: b", "B", True),
    ],
)
def test_a_response_is_right(match: dict[str, Any], response: str, answer: str, expected: bool) -> None:
    assert is_right(match, response, answer) is expected


def test_any_of_several_answers_is_right() -> None:
    assert is_right({"name": "exact"}, "NYC", "New York", "NYC")
    assert not is_right({"name": "exact"}, "LA", "New York", "NYC")


def test_the_last_number_is_a_value() -> None:
    assert last_number("no digits") is None
    assert last_number("1,234,567.8") == last_number("1234567.80")


def test_an_answer_without_a_number_is_refused_where_numbers_are_compared() -> None:
    match = CONFIG.validate_python({"name": "last_number"})
    refuse_unfit_answers(match, [question("72")])
    with pytest.raises(DataError, match=r"questions\.jsonl:1: the answer 'many' holds no number"):
        refuse_unfit_answers(match, [question("72"), question("7", "many")])


def test_a_pattern_must_be_one() -> None:
    with pytest.raises(ValidationError, match="is no regular expression: missing"):
        CONFIG.validate_python({"name": "regex", "pattern": "(x"})


def within(response: str, row: dict[str, Any], *, distance: int) -> bool:
    return abs(int(response) - row["answer"]) <= distance


def three_arguments(response: str, row: dict[str, Any], more: str) -> bool:
    return True


def unsure(response: str, row: dict[str, Any]) -> str:
    return "perhaps"


def taking(response: str, row: dict[str, Any]) -> bool:
    return bool(row["tests"].pop() == response)


def custom(target: str, **params: Any) -> MatchConfig:
    return CONFIG.validate_python({"name": "custom", "target": f"{HERE}:{target}", "params": params})


def test_a_grader_of_ones_own_gets_the_response_and_the_whole_row() -> None:
    matcher = build_matcher(custom("within", distance=2))
    assert matcher("41", question("42", answer=42))
    assert not matcher("39", question("42", answer=42))


def test_what_a_grader_does_to_a_row_is_not_seen_by_the_next_one() -> None:
    asked = question(tests=["1", "42"])
    matcher = build_matcher(custom("taking"))
    assert [matcher("42", asked) for _ in range(3)] == [True, True, True]


@pytest.mark.parametrize(
    ("target", "params", "words"),
    [
        ("within", {}, "missing params: distance"),
        ("within", {"distance": 1, "colour": "red"}, "unknown params: colour"),
        ("three_arguments", {}, "missing params: more"),
        ("absent", {}, "has no function 'absent'"),
    ],
)
def test_a_grader_that_cannot_be_called_is_refused_by_name(target: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation\.questions\.match: .*{words}"):
        build_matcher(custom(target, **params))


def test_a_grader_must_say_yes_or_no() -> None:
    with pytest.raises(TypeError, match="returned 'perhaps'; it must return True or False"):
        build_matcher(custom("unsure"))("42", question("42"))
