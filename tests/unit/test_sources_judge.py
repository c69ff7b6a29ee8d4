"""What judges say of samples, and of rows that they cannot judge by."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.errors import ConfigError, DataError
from kdmesh.types import FinishReason, Sample
from kdmesh_trainer.data.encoding.sides import Addressed, Prompt, Question, teacher_side
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.sections.data_config import ChatFile, CustomDataset
from kdmesh_trainer.sections.judge_config import JudgeConfig
from kdmesh_trainer.sources.judge import Judge, digest_questions, question_of, resolve_judge
from kdmesh_trainer.sources.rollouts import Rollout, Verdict

CONFIG: TypeAdapter[JudgeConfig] = TypeAdapter(JudgeConfig)
NUMBERS = {"name": "match", "match": {"name": "last_number"}}
HERE = "tests.unit.test_sources_judge"


def chat(**row: Any) -> Chat:
    messages = (Message(role="user", content="6 x 7?"), Message(role="assistant", content="so it is #### 42"))
    return Chat(messages=messages, origin="train.jsonl:3", row=row)


def asked(cfg: JudgeConfig, row: Chat) -> Question | None:
    keep = question_of(cfg)
    return None if keep is None else keep(row)


def verdict(judge: dict[str, Any], text: str, *, is_cut_off: bool = False, **row: Any) -> Verdict:
    cfg = CONFIG.validate_python(judge)
    question = asked(cfg, chat(**row))
    sample = Sample(
        token_ids=np.array([ord(character) for character in text], np.int32),
        logprobs=np.zeros(len(text), np.float32),
        finish_reason=FinishReason.LENGTH if is_cut_off else FinishReason.STOP,
        min_weight_version=1,
        max_weight_version=1,
    )
    prompt = Prompt(token_ids=np.array([1], np.int32), question=question)
    told: list[Verdict] = []
    found = Judge(resolve_judge(cfg), lambda ids: "".join(map(chr, ids))).submit(prompt, sample, told.append).result()
    assert told == [found]
    return found


def by_unit(response: str, row: dict[str, object], is_cut_off: bool, *, unit: str) -> float:
    return 0.25 if is_cut_off else 2 * (response == f"{row['answer']} {unit}")


def returns(response: str, row: dict[str, object], is_cut_off: bool, *, value: Any) -> Any:
    row.clear()
    return np.float32(value) if value == 0.5 else value


def custom(function: str, **params: Any) -> dict[str, Any]:
    return {"name": "custom", "target": f"{HERE}:{function}", "params": params}


@pytest.mark.parametrize(
    ("judge", "text", "is_cut_off", "expected"),
    [
        ({"name": "finished"}, "so", False, Verdict(weight=1)),
        ({"name": "finished"}, "so", True, Verdict(weight=0)),
        ({"name": "finished", "cut": 0.3}, "so", True, Verdict(weight=0.3)),
        (NUMBERS, "it is 42", False, Verdict(weight=1, is_right=True)),
        (NUMBERS, "it is 41", False, Verdict(weight=0, is_right=False)),
        ({**NUMBERS, "answer": "answer"}, "it is 7", False, Verdict(weight=1, is_right=True)),
        ({**NUMBERS, "right": 3, "wrong": 0.2}, "it is 41", False, Verdict(weight=0.2, is_right=False)),
        ({**NUMBERS, "right": 3}, "it is 42", True, Verdict(weight=3, is_right=True)),
        ({**NUMBERS, "cut": 0}, "it is 42", True, Verdict(weight=0, is_right=True)),
        (custom("by_unit", unit="m"), "7 m", False, Verdict(weight=2)),
        (custom("by_unit", unit="m"), "7 km", False, Verdict(weight=0)),
        (custom("by_unit", unit="m"), "7 m", True, Verdict(weight=0.25)),
        (custom("returns", value=0.5), "so", False, Verdict(weight=0.5)),
    ],
)
def test_a_judge_says_what_a_sample_weighs(
    judge: dict[str, Any], text: str, is_cut_off: bool, expected: Verdict
) -> None:
    assert verdict(judge, text, is_cut_off=is_cut_off, answer=7) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "TypeError: tests.unit.test_sources_judge:returns returned None; a weight must be a number"),
        (True, "returned True; a weight must be a number"),
        ("1", "returned '1'; a weight must be a number"),
        (-0.5, "ValueError: tests.unit.test_sources_judge:returns returned -0.5; a weight must be finite and not neg"),
        (float("nan"), "returned nan; a weight must be finite"),
        (float("inf"), "returned inf; a weight must be finite"),
        (10**400, "OverflowError"),
    ],
)
def test_what_is_no_weight_is_an_error_and_leaves_the_sample_out(value: object, words: str) -> None:
    found = verdict(custom("returns", value=value), "so", answer=7)
    assert found.weight == 0
    assert words in found.error


def test_a_judge_that_raises_is_told_and_leaves_the_sample_out() -> None:
    assert verdict(custom("by_unit", unit="m"), "so") == Verdict(weight=0, error="KeyError: 'answer'")


def leaves(response: str, row: dict[str, Any], is_cut_off: bool) -> float:
    row["answer"].append(response)
    sys.exit(0)


def test_a_judge_that_would_end_the_process_is_told_too_and_changes_no_row() -> None:
    answer = ["no"]
    assert verdict(custom("leaves"), "so", answer=answer) == Verdict(weight=0, error="SystemExit: 0")
    assert answer == ["no"]


def test_a_judge_that_cannot_be_called_so_is_refused() -> None:
    for function, params, words in [
        ("by_unit", {}, "missing params: unit"),
        ("by_unit", {"unit": "m", "colour": "red"}, "unknown params: colour"),
        ("absent", {}, "has no function 'absent'"),
    ]:
        with pytest.raises(ConfigError, match=rf"source\.judge: .*{words}"):
            resolve_judge(CONFIG.validate_python(custom(function, **params)))
    own = {"name": "match", "match": custom("absent")}
    with pytest.raises(ConfigError, match=r"source\.judge\.match: .*has no function 'absent'"):
        resolve_judge(CONFIG.validate_python(own))


@pytest.mark.parametrize(
    ("judge", "row", "words"),
    [
        ({**NUMBERS, "answer": "a"}, {"b": 1}, "no column 'a', which source.judge.answer names; columns found: b"),
        ({**NUMBERS, "answer": "a"}, {"a": " "}, "a is blank"),
        ({**NUMBERS, "answer": "a"}, {"a": {"b": 1}}, "a must be a text, a number or a list of these, not dict"),
        ({**NUMBERS, "answer": "a"}, {"a": "seven"}, "the answer 'seven' holds no number, which match last_number"),
    ],
)
def test_a_row_without_an_answer_is_refused_with_its_place(
    judge: dict[str, Any], row: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:3: ") as refused:
        asked(CONFIG.validate_python(judge), chat(**row))
    assert words in str(refused.value)


def test_a_chat_that_ends_before_its_answer_is_refused() -> None:
    whole = chat()
    with pytest.raises(DataError, match=r"train.jsonl:3: source.judge.answer is null, and this does not end with"):
        asked(CONFIG.validate_python(NUMBERS), replace(whole, messages=whole.messages[:1]))


def test_what_is_judged_by_is_known_by_its_digest() -> None:
    def found(judge: dict[str, Any], *rows: dict[str, Any]) -> str:
        cfg = CONFIG.validate_python(judge)
        questions = [asked(cfg, chat(**row)) for row in rows]
        return digest_questions([Prompt(token_ids=np.array([1], np.int32), question=each) for each in questions])

    by_column, own = {**NUMBERS, "answer": "a"}, custom("by_unit", unit="m")
    assert found({"name": "finished"}, {"a": 1}) == ""
    assert found(by_column, {"a": 1}, {"a": 2}) == found(by_column, {"a": 1, "b": 5}, {"a": 2})
    assert found(by_column, {"a": 1}, {"a": 2}) != found(by_column, {"a": 1}, {"a": 3})
    assert found(own, {"a": 1}) != found(own, {"a": 1, "b": b"\0"})


def one_chat() -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": "what?"}]]


def test_rows_are_kept_whole_for_a_judge_and_for_nobody_else(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"messages": [{"role": "user", "content": "what?"}], "level": 3}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for dataset, whole in (
        (ChatFile(path=tmp_path / "a.parquet"), row),
        (CustomDataset(format="custom", target=f"{HERE}:one_chat"), {"messages": row["messages"]}),
    ):
        assert [chat.row for chat in open_dataset(dataset, keeps_rows=True)()] == [whole]
        assert [chat.row for chat in open_dataset(dataset)()] == [None]


def test_a_weight_is_of_the_student_s_sequence_whoever_the_teacher_is_and_whatever_it_reads() -> None:
    sample = Sample(
        token_ids=np.array([7, 8], np.int32),
        logprobs=np.zeros(2, np.float32),
        finish_reason=FinishReason.STOP,
        min_weight_version=1,
        max_weight_version=1,
    )
    prompt, longer = np.array([1], np.int32), np.array([1, 2, 3], np.int32)
    for read in (None, longer):
        plain = Rollout.of(prompt, sample, teacher_prompt_ids=read, teacher_name="maths")
        heavy, left_out = plain.judged(Verdict(weight=2.5)), plain.judged(Verdict(weight=0))
        assert (heavy.sequence.weight, heavy.counts, left_out.counts, plain.counts) == (2.5, True, False, True)
        [theirs] = teacher_side([heavy.sequence])
        assert isinstance(theirs, Addressed)
        assert (theirs.teacher_name, theirs.num_tokens) == ("maths", 3 if read is None else 5)
