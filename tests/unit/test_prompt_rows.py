"""Which rows of a file of prompts are refused, and that each is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdmesh.answering.prompt_rows import Asked, Prompts
from kdmesh.chats.image_files import ImageColumn, NoImages
from kdmesh.errors import DataError

TEXT_ALONE = ImageColumn(source=NoImages("text alone"), name=None)


def read(tmp_path: Path, line: str) -> Asked:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hi"}\n' + line + "\n", encoding="utf-8")
    _, asked = Prompts(path).rows(TEXT_ALONE)
    return asked


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"prompt": "a\ud83d"}, r"messages\[0\]\.content"),
        ({"prompt": "a", "system": "a\udc00"}, "system"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, r"messages\[0\]\.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a\ud83d"}]}]},
            r"messages\[0\]\.content\[0\]\.text",
        ),
    ],
)
def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path, row: object, place: str) -> None:
    with pytest.raises(DataError, match=rf"prompts\.jsonl, line 2: {place} is not Unicode text: half .* 1"):
        read(tmp_path, json.dumps(row))


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "human", "content": "Hi"}, "unknown role 'human'"),
        ({"role": "user", "content": None}, "`content` is missing or null"),
        ({"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, "only parts of type 'text' and 'image'"),
        ({"role": "user", "content": "Hi", "tool_calls": [{"name": "f"}]}, "only the assistant calls tools"),
        ({"role": "user", "content": "Hi", "function_call": {"name": "f"}}, "'function_call' is not supported"),
    ],
)
def test_what_no_dataset_may_hold_is_refused_before_it_is_answered(tmp_path: Path, turn: object, said: str) -> None:
    with pytest.raises(DataError, match=rf"prompts\.jsonl, line 2: messages\[0\].*{said}"):
        read(tmp_path, json.dumps({"messages": [turn]}))


@pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}]])
def test_of_a_row_with_both_forms_the_messages_are_answered_as_a_trainer_reads_them(
    tmp_path: Path, prompt: object
) -> None:
    turns = [{"role": "user", "content": "Hello"}]
    assert read(tmp_path, json.dumps({"prompt": prompt, "messages": turns})).messages == turns
    assert read(tmp_path, json.dumps({"prompt": prompt, "messages": None})).messages == [
        {"role": "user", "content": "Hi"}
    ]


def test_turns_are_shown_to_the_template_as_a_trainer_shows_them_and_kept_as_they_are(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]},
        {"role": "user", "content": "And?"},
    ]
    answers = [{"role": "assistant", "content": None, "reasoning": "why"}, {"from": "gpt", "value": "forget this"}]
    asked = read(tmp_path, json.dumps({"messages": [*turns, *answers], "system": "Be brief."}))
    assert asked.messages == [{"role": "system", "content": "Be brief."}, *turns]
    assert asked.shown == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And?"},
    ]


@pytest.mark.parametrize("line", ["{", "9" * 5000, "[" * 200_000])
def test_what_is_no_json_that_python_reads_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2 is not JSON"):
        read(tmp_path, line)


def test_whole_pairs_and_what_nobody_asks_are_taken(tmp_path: Path) -> None:
    asked = read(tmp_path, '{"prompt": "\\ud83d\\ude00", "note": "\\ud83d"}')
    assert asked.messages == [{"role": "user", "content": "😀"}]


def test_a_prompt_may_be_turns_as_in_datasets(tmp_path: Path) -> None:
    asked = read(tmp_path, '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}')
    assert asked.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.raises(DataError, match=r"line 2 has neither `messages`.* nor `prompt`, a text or a list of turns"):
        read(tmp_path, '{"prompt": ["u"]}')


def test_tools_are_shown_as_objects_and_kept_as_the_row_has_them(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    asked = read(tmp_path, json.dumps({"messages": turns, "tools": '[{"name": "f"}]'}))
    assert asked.messages == turns
    assert asked.shown[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert asked.tools == ({"name": "f"},)
    assert asked.columns == {"tools": '[{"name": "f"}]'}
    with pytest.raises(DataError, match=r"line 2: tools is not Unicode text"):
        read(tmp_path, json.dumps({"prompt": "Hi", "tools": [{"name": "a\ud83d"}]}))
