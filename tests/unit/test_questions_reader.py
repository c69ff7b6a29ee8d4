"""Questions are read with their answers, which are never a part of what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from kdmesh.chats.chat_rows import TEXT_ALONE
from kdmesh.errors import DataError
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer
from kdmesh_trainer.questions.exam import Exam, read_exam
from kdmesh_trainer.questions.reader import read_questions
from kdmesh_trainer.sections.questions_config import QuestionsConfig
from tests.support.tiny_models import save_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which animal jumps?"},
    {"role": "assistant", "content": "the quick brown fox"},
]


def write(directory: Path, *rows: Any) -> Path:
    path = directory / "questions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def config(path: Path, **keys: Any) -> QuestionsConfig:
    return QuestionsConfig.model_validate({"path": str(path), **keys})


def test_a_text_becomes_the_users_turn_and_answers_become_texts(tmp_path: Path) -> None:
    rows = [{"q": "six times seven?", "a": 42}, {"q": "a colour?", "a": ["red", "green"]}, {"q": "pi?", "a": 3.5}]
    questions = read_questions(config(write(tmp_path, *rows), question="q", answer="a"))
    assert [question.answers for question in questions] == [("42",), ("red", "green"), ("3.5",)]
    assert [message.role for question in questions for message in question.chat.messages] == ["user"] * 3
    assert questions[0].chat.messages[0].content == "six times seven?"
    assert questions[1].row == rows[1]
    assert questions[2].chat.origin == f"{tmp_path / 'questions.jsonl'}:3"


def test_what_a_row_says_beside_its_question_is_heeded_as_in_a_dataset(tmp_path: Path) -> None:
    row = {"question": "two?", "answer": "2", "system": "Be brief."}
    (question,) = read_questions(config(write(tmp_path, row)))
    assert [(turn.role, turn.content) for turn in question.chat.messages] == [("system", "Be brief."), ("user", "two?")]
    (question,) = read_questions(config(write(tmp_path, {**row, "tools": [{"name": "search"}]})))
    assert question.chat.tools == ({"name": "search"},)


def test_only_the_first_questions_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "one?", "answer": "1"}, "", {"question": "two?", "answer": "2"}, "{")
    assert len(read_questions(config(path, limit=2))) == 2


def test_the_turn_that_ends_a_chat_is_the_answer_or_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": CHAT, "answer": "fox"})
    for answer, expected in ((None, "the quick brown fox"), ("answer", "fox")):
        (question,) = read_questions(config(path, messages="messages", answer=answer))
        assert question.answers == (expected,)
        assert [message.role for message in question.chat.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("row", "keys", "words"),
    [
        ("{", {}, r"questions.jsonl:1: not JSON"),
        ("9" * 5000, {}, r"questions.jsonl:1: not JSON: .*4300 digits"),
        ("[" * 200_000, {}, r"questions.jsonl:1: not JSON: .*recursion"),
        ([1], {}, "a row must be an object, not list"),
        (
            {"text": "x", "answer": "y"},
            {},
            r"no column 'question', which evaluation\.questions\.question names; .*text",
        ),
        (
            {"question": "x", "label": "y"},
            {},
            r"no column 'answer', which evaluation\.questions\.answer names; .*label",
        ),
        ({"question": " ", "answer": "y"}, {}, "question must be a text that is not blank"),
        ({"question": "x", "answer": ""}, {}, "answer is blank"),
        ({"question": "x", "answer": []}, {}, "answer is blank"),
        ({"question": "x", "answer": ["y", " "]}, {}, "answer is blank"),
        ({"question": "x", "answer": {"y": 1}}, {}, "must be a text, a number or a list of these, not dict"),
        ({"question": "x", "answer": "\ud83d"}, {}, r"jsonl:1: answer is not Unicode text: half a surrogate pair"),
        ({"question": "x", "answer": ["y", "a\udc00"]}, {}, "half a surrogate pair at character 1"),
        ({"question": "x", "answer": True}, {}, "must be a text, a number or a list of these, not bool"),
        ({"messages": CHAT[:2]}, {"messages": "messages", "answer": None}, "ends with a turn of the user"),
        ({"messages": CHAT[2:]}, {"messages": "messages", "answer": None}, "there is no turn to answer"),
        ({"chat": CHAT}, {"messages": "messages"}, "no column 'messages'"),
        ({"messages": [{"role": "clown", "content": "x"}], "answer": "y"}, {"messages": "messages"}, "unknown role"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_the_rule(
    tmp_path: Path, row: Any, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        read_questions(config(write(tmp_path, row), **keys))


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read evaluation\.questions\.path .*absent\.jsonl"):
        read_questions(config(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="holds no question"):
        read_questions(config(write(tmp_path)))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"answer": None}, "answer is null, which needs `messages`"),
        ({"messages": "m", "question": "q"}, "there are `question` and `messages`"),
        ({"pass_at": [4]}, "pass_at 4 needs as many samples, and samples is 1"),
        ({"samples": 4, "pass_at": [2, 2], "sampling": {"temperature": 1}}, "names a number twice"),
        ({"samples": 4}, "samples is 4 at sampling.temperature 0"),
        ({"pass_at": [0]}, "greater than or equal to 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(tmp_path / "any.jsonl", **keys)


def exam(path: Path, model: Path, **keys: Any) -> Exam:
    tokenizer = load_fast_tokenizer(model)
    encoder = ChatEncoder(tokenizer)
    return read_exam(config(path, **keys), model=model, tokenizer=tokenizer, encoder=encoder, images=TEXT_ALONE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer alone."""
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


def test_what_is_asked_ends_where_the_answer_begins_and_holds_none_of_it(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path, {"messages": CHAT, "secret": "it is not told either"})
    read = exam(path, model, messages="messages", answer=None)
    tokenizer = load_fast_tokenizer(model)
    asked = tokenizer.decode(read.prompts[0].token_ids.tolist())
    assert asked == tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert "fox" not in asked
    assert "told" not in asked
    assert read.max_tokens == len(read.prompts[0].token_ids) + 256


def test_draws_follow_from_the_seed_and_the_place_alone(tmp_path: Path, model: Path) -> None:
    rows = [{"question": "a?", "answer": "b"}] * 3
    path = write(tmp_path, *rows)
    one, again, other = (
        [prompt.seed for prompt in exam(path, model, seed=seed, limit=limit).prompts]
        for seed, limit in ((0, 3), (0, 2), (1, 3))
    )
    assert one[:2] == again
    assert len({*one, *other}) == 6


def test_a_response_is_read_without_what_ends_it(tmp_path: Path, model: Path) -> None:
    read = exam(write(tmp_path, {"question": "a?", "answer": "b"}), model)
    tokenizer = load_fast_tokenizer(model)
    ids = tokenizer("the fox", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in read.sampling.stop_token_ids
    assert read.decode(np.array([*ids, end], np.int32)) == read.decode(np.array(ids, np.int32)) == "the fox"


def test_a_response_is_read_without_the_text_that_ends_it(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path, {"question": "a?", "answer": "b"})
    read = exam(path, model, sampling={"stop_strings": ["\nQ:", "fox "]})
    ids = load_fast_tokenizer(model)("the fox\nQ: so", add_special_tokens=False)["input_ids"]
    assert read.sampling.stop_strings == ("\nQ:", "fox ")
    assert read.decode(np.array(ids, np.int32)) == "the fox"


def test_a_question_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tokenizer(model)
    tokenizer = load_fast_tokenizer(model)
    tokenizer.chat_template = "{{ raise_exception('no such turn') }}"
    encoder = ChatEncoder(tokenizer)
    path = write(tmp_path, {"question": "a?", "answer": "b"})
    with pytest.raises(DataError, match=r"questions\.jsonl:1: refused by the chat template"):
        read_exam(config(path), model=model, tokenizer=tokenizer, encoder=encoder, images=TEXT_ALONE)
