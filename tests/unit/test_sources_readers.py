"""Datasets are read in every supported form, and refused with the place and the rule."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.chats.chat_rows import Chat, Message, chat_from_row
from kdmesh.errors import ConfigError, DataError
from kdmesh_trainer.data.files.readers import groups_of, open_dataset
from kdmesh_trainer.sections.data_config import ChatFile, CustomDataset

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ROW = {"messages": [USER, ASSISTANT]}
TURNS = [("user", "Hi"), ("assistant", "Hello")]


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path, column: str = "messages") -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in chat.messages] for chat in open_dataset(ChatFile(path=path, column=column))()]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("num_chats", "characters", "largest"), [(600, 1, 256), (9, 2**20, 4), (3, 2**23, 1)])
def test_as_many_chats_are_encoded_together_as_their_texts_allow(num_chats: int, characters: int, largest: int) -> None:
    message = Message(role="user", content="x" * characters)
    chats = [Chat(messages=(message,), origin=str(number)) for number in range(num_chats)]
    groups = list(groups_of(chats))
    assert max(map(len, groups)) == largest
    assert [chat for group in groups for chat in group] == chats


def test_json_lines_arrays_and_parquet_give_the_same_chats(tmp_path: Path) -> None:
    rows = [ROW, {"messages": [{"role": "system", "content": "日本語 🎉"}, USER, ASSISTANT]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    expected = [TURNS, [("system", "日本語 🎉"), *TURNS]]
    assert read(write(tmp_path / "a.jsonl", lines(*rows))) == expected
    assert read(write(tmp_path / "b.json", json.dumps(rows, indent=2))) == expected
    assert read(write(tmp_path / "lines.json", lines(*rows))) == expected
    assert read(tmp_path / "c.parquet") == expected


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_weighs_what_its_column_says(tmp_path: Path, suffix: str) -> None:
    rows = [{**ROW, "score": weight, "more": "x"} for weight in (2, 0.5, 0, 1e-9)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "score": float(row["score"])} for row in rows]), path)
    else:
        write(path, lines(*rows))
    assert [chat.weight for chat in open_dataset(ChatFile(path=path, weight_column="score"))()] == [2, 0.5, 0, 1e-9]
    assert {chat.weight for chat in open_dataset(ChatFile(path=path))()} == {1.0}


@pytest.mark.parametrize("value", ["-1", "true", "NaN", "Infinity", '"x"', '"nan"', "[1]", "null", "1e999"])
def test_a_weight_that_is_no_finite_number_of_at_least_0_is_refused(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "a.jsonl", lines({**ROW, "score": 1}) + json.dumps(ROW)[:-1] + f', "score": {value}}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*score.*(a weight must be|which weight_column names)"):
        list(open_dataset(ChatFile(path=path, weight_column="score"))())


@pytest.mark.parametrize("value", ["1e301", "1" + "0" * 400, '"1e301"'])
def test_a_weight_of_which_no_sum_can_be_made_is_refused(tmp_path: Path, value: str) -> None:
    row = f'{{"prompt": "a", "completion": "b", "w": {value}}}'
    with pytest.raises(DataError, match=r"a\.jsonl:1: w is .*; a weight must be at most 1e\+300"):
        list(open_dataset(ChatFile(path=write(tmp_path / "a.jsonl", row), weight_column="w"))())


def test_a_directory_is_read_in_the_order_of_its_file_names(tmp_path: Path) -> None:
    for name in ("b.json", "a.jsonl"):
        write(tmp_path / name, lines({"messages": [{"role": "user", "content": name}]}))
    write(tmp_path / "notes.txt", "not data")
    assert read(tmp_path) == [[("user", "a.jsonl")], [("user", "b.json")]]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", "\ufeff" + lines(ROW) + "\n  \n" + lines(ROW))) == [TURNS, TURNS]
    assert read(write(tmp_path / "b.json", "\ufeff \n" + json.dumps([ROW]))) == [TURNS]


def test_every_usual_form_of_a_row_is_recognised(tmp_path: Path) -> None:
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    rows: list[dict[str, Any]] = [
        ROW,
        {"conversations": share},
        {"conversations": share, "system": "Be brief"},
        {"messages": share},
        {"conversations": [USER, ASSISTANT]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello", "system": ""},
        {"instruction": "Add", "input": "1 and 2", "output": "3", "system": "Be brief"},
        {"messages": [USER, {"role": "assistant", "content": parts, "tool_calls": None, "weight": 1}], "id": 7},
        {"messages": [{**USER, "loss": False}, {**ASSISTANT, "train": True, "thinking": ""}], "tools": "[]"},
        {
            **ROW,
            "system": "Be brief",
            "tools": [],
            "functions": None,
            "chat_template_kwargs": {"enable_thinking": None},
        },
        {"messages": share, "system": "Be brief"},
        {"messages": [{"role": "system", "content": "Be brief"}, USER, ASSISTANT], "system": "Be brief"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ASSISTANT], "messages": None},
        {"prompt": [USER], "completion": "Hello", "system": "Be brief"},
        {"prompt": "Hi", "completion": None},
    ]
    brief = ("system", "Be brief")
    assert read(write(tmp_path / "a.jsonl", lines(*rows))) == [
        TURNS,
        TURNS,
        [brief, *TURNS],
        TURNS,
        TURNS,
        TURNS,
        TURNS,
        [brief, ("user", "Add\n\n1 and 2"), ("assistant", "3")],
        TURNS,
        TURNS,
        [brief, *TURNS],
        [brief, *TURNS],
        [brief, *TURNS],
        TURNS,
        TURNS,
        [brief, *TURNS],
        TURNS[:1],
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_columns_of_question_and_answer_may_have_other_names(tmp_path: Path, suffix: str) -> None:
    row = {"question": "Hi", "answer": "Hello", "prompt": "not this", "id": 3}
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write(path, lines(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    [chat] = open_dataset(ChatFile(path=path, prompt_column="question", completion_column="answer"))()
    assert [(m.role, m.content) for m in chat.messages] == TURNS


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_that_are_named_are_read_whatever_else_a_row_has(tmp_path: Path, suffix: str) -> None:
    other = [{"role": "user", "content": "not"}, {"role": "assistant", "content": "this"}]
    row = {"messages": other, "conversations": other, "instruction": "nor", "output": "this"}
    named = row | {"question": "Hi", "answer": "Hello"}
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write(path, lines(named))
    else:
        pq.write_table(pa.Table.from_pylist([named]), path)
    keys = {"prompt_column": "question", "completion_column": "answer"}
    [chat] = open_dataset(ChatFile(path=path, **keys))()
    assert [(m.role, m.content) for m in chat.messages] == TURNS
    [chat] = open_dataset(ChatFile(path=path, column="conversations", **keys))()
    assert [m.content for m in chat.messages] == ["not", "this"]
    path = write(tmp_path / "b.jsonl", lines({**named, "question": None}))
    [chat] = open_dataset(ChatFile(path=path, **keys))()
    assert [m.content for m in chat.messages] == ["not", "this"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("key", ["column", "prompt_column", "completion_column"])
def test_a_column_that_is_named_and_that_no_row_has_is_refused(tmp_path: Path, key: str, suffix: str) -> None:
    row = {"messages": [USER, ASSISTANT], "instruction": "Hi", "output": "Hello", "prompt": "Hi", "id": 3}
    path, late = tmp_path / f"a.{suffix}", row | {"qestion": [USER] if key == "prompt_column" else [USER, ASSISTANT]}
    if suffix == "jsonl":
        write(path, lines(row, row))
        write(tmp_path / "b.jsonl", lines(row, row, late))
    else:
        pq.write_table(pa.Table.from_pylist([row, row]), path)
        pq.write_table(pa.Table.from_pylist([late]), tmp_path / "b.parquet")
    refusal = rf"a\.{suffix}: no row has a column 'qestion', .* in .*a\.{suffix}:(| row )1: messages, instruction"
    with pytest.raises(DataError, match=refusal):
        next(open_dataset(ChatFile.model_validate({"path": path, key: "qestion"}))())
    some = ChatFile.model_validate({"path": tmp_path, key: "qestion"})
    assert sum(1 for _ in open_dataset(some)()) > 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_system_text_beside_the_chat_is_its_first_turn_in_whichever_column(tmp_path: Path, suffix: str) -> None:
    row = {"chat": [USER, ASSISTANT], "system": "Be brief"}
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write(path, lines(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    assert read(path, "chat") == [[("system", "Be brief"), *TURNS]]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_says_which_turns_carry_loss(tmp_path: Path, suffix: str) -> None:
    flags: list[dict[str, Any]] = [{}, {"weight": 0}, {"weight": 1, "train": None}, {"loss": False}, {"training": True}]
    turns = [turn for flag in flags for turn in (USER, {**ASSISTANT, **flag})]
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "train": False}]
    rows = [{"messages": turns, "conversations": None}, {"messages": None, "conversations": share}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write(path, lines(*rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    chats = [
        [m.is_trained for m in chat.messages if m.role == "assistant"] for chat in open_dataset(ChatFile(path=path))()
    ]
    assert chats == [[True, False, True, False, True], [False]]


@pytest.mark.parametrize("completion", ["Hello", [ASSISTANT], None])
def test_the_completion_carries_loss_and_no_turn_of_its_prompt(tmp_path: Path, completion: object) -> None:
    path = write(tmp_path / "a.jsonl", lines({"prompt": [USER, ASSISTANT, USER], "completion": completion}))
    [chat] = open_dataset(ChatFile(path=path))()
    trained = [message.is_trained for message in chat.messages if message.role == "assistant"]
    assert trained == ([False] if completion is None else [False, True])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_what_an_assistant_thought_is_known_by_any_of_its_names(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.jsonl", lines({"messages": [{**USER, key: None}, {**ASSISTANT, key: "hm"}]}))
    [chat] = open_dataset(ChatFile(path=path))()
    assert [m.reasoning for m in chat.messages] == ["", "hm"]


def test_parquet_rows_of_other_forms_are_recognised(tmp_path: Path) -> None:
    alpaca = pa.table({"instruction": ["Hi"], "input": [""], "output": ["Hello"], "score": [0.5]})
    pq.write_table(alpaca, tmp_path / "a.parquet")
    pq.write_table(pa.table({"chat": [[USER, ASSISTANT]]}), tmp_path / "b.parquet")
    assert read(tmp_path / "a.parquet") == [TURNS]
    assert read(tmp_path / "b.parquet", column="chat") == [TURNS]


def test_the_column_may_have_another_name(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", lines({"chat": [USER, ASSISTANT], "messages": 3})), "chat") == [TURNS]


def test_chats_know_where_they_were_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(ROW) + "\n" + lines(ROW))
    assert [chat.origin for chat in open_dataset(ChatFile(path=path))()] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(ROW) + '{"messages": [\n', r"a\.jsonl:2: not JSON: .* at column 15"),
        (lines(ROW, ROW) + "oops\n" + lines(ROW), r"a\.jsonl:3: not JSON"),
        (lines(ROW, 3), r"a\.jsonl:2: a row must be an object, not int"),
        (lines(ROW, None), r"a\.jsonl:2: a row must be an object, not null"),
        (
            lines({"text": "x", "id": 1}),
            r"a\.jsonl:1: no column 'messages'.*columns found: text, id; to train on plain text: `format: text`$",
        ),
        (lines({"text": 1}), r"columns found: text$"),
        (lines({}), r"columns found: none"),
        (lines({"messages": None, "id": 1}), r"a\.jsonl:1: no column 'messages'.*columns found: messages \(null\), id"),
        (lines({"instruction": "x"}), r"columns found: instruction"),
        (lines({"messages": "Hi"}), r"a\.jsonl:1: messages must be a list of messages, not str"),
        (lines({"messages": []}), r"a\.jsonl:1: messages has no message"),
        (lines({"messages": ["Hi"]}), r"messages\[0\]: a message must be an object, not str"),
        (lines({"messages": [USER, {"content": "x"}]}), r"messages\[1\]: no `role` \(or `from`\); keys found: content"),
        (lines({"messages": [{"role": "bot", "content": "x"}]}), r"unknown role 'bot'; known: system, developer, user"),
        (lines({"messages": [{"role": 3, "content": "x"}]}), r"unknown role 3"),
        (lines({"conversations": [{"from": "bot", "value": "x"}]}), r"unknown role 'bot'; known: system, human"),
        (lines({"messages": [{"role": "user"}]}), r"`content` is missing or null; keys found: role"),
        (lines({"messages": [{"role": "user", "content": 3}]}), r"messages\[0\]\.content must be a string, not int"),
        (
            lines({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
            r"messages\[0\]\.content\[0\]: only parts of type 'text' and 'image' are supported, not 'audio'",
        ),
        (
            lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
            r"messages\[0\]\.content\[0\] is an image, and the student reads text alone",
        ),
        (lines({"messages": [{"role": "user", "content": [{"type": "text"}]}]}), r"\.text must be a string, not null"),
        (lines({"messages": [{**ASSISTANT, "tool_calls": [{"id": 1}]}]}), r"\.tool_calls\[0\] must be a function with"),
        (lines({"messages": [{**ASSISTANT, "function_call": {"name": "f"}}]}), r"'function_call' is not supported"),
        (
            lines({"messages": [{**ASSISTANT, "reasoning_content": 3}]}),
            r"\[0\]\.reasoning_content must be a string, no",
        ),
        (lines({"messages": [{**ASSISTANT, "weight": 0.5}]}), r"messages\[0\]: 'weight' is 0\.5; a turn of the assis"),
        (lines({"messages": [{**USER, "reasoning": "hm"}]}), r"messages\[0\]: 'reasoning' at a turn of the user"),
        (
            lines({"messages": [{**ASSISTANT, "thinking": "hm", "reasoning": "hm"}]}),
            r"reasoning and thinking both hold reasoning",
        ),
        (lines({"messages": [USER, {**ASSISTANT, "train": "no"}]}), r"messages\[1\]: 'train' is 'no'; it must be"),
        (lines({"messages": [{**USER, "train": True}]}), r"'train' is true, and a turn of the user is never trained"),
        (lines({"messages": [{**USER, "loss": 1}]}), r"messages\[0\]: 'loss' is 1; it must be true or false"),
        (
            lines({**ROW, "chat_template_kwargs": {"enable_thinking": False}}),
            r"`chat_template_kwargs` is not supported",
        ),
        (lines({**ROW, "tools": [{"title": "f"}]}), r"a\.jsonl:1: tools\[0\] must be a function with a name"),
        (lines({"instruction": "x", "output": "y", "functions": [{"name": "f"}]}), r"`functions` is not supported"),
        (
            lines({"messages": [{"role": "system", "content": "a"}, USER], "system": "b"}),
            r"a\.jsonl:1: both `system` and the messages hold a system turn",
        ),
        (lines({**ROW, "system": ["b"]}), r"a\.jsonl:1: system must be a string, not list"),
        (lines({"prompt": 3}), r"a\.jsonl:1: prompt must be a string, not int"),
        (lines({"prompt": "x", "completion": [3]}), r"completion\[0\]: a message must be an object, not int"),
        (lines({"instruction": "x", "output": 3}), r"a\.jsonl:1: output must be a string, not int"),
        (lines({"instruction": "x", "output": "y", "history": [["a", "b"]]}), r"`history` of Alpaca rows"),
        ('{"messages": [{"role": "user", "content": "a\\ud800"}]}\n', r"half a surrogate pair at character 1"),
        (lines(ROW) + '{"id": ' + "9" * 5000 + "}\n", r"a\.jsonl:2: not usable JSON: .*4300 digits"),
        ("[" * 200_000 + "\n", r"a\.jsonl:1: not usable JSON: nested too deeply"),
        ("", r"dataset .*a\.jsonl is empty"),
        ("\n \n", r"dataset .*a\.jsonl is empty"),
    ],
)
def test_a_bad_row_is_refused_with_its_place_and_the_rule(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", text)
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_malformed_array_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[\n{"messages": []},\n{"messages": \n')
    with pytest.raises(DataError, match=r"a\.json:4: not JSON"):
        read(path)


def test_an_object_of_several_lines_is_refused_with_the_rule(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(ROW, indent=1))
    with pytest.raises(
        DataError, match=r"a\.json:1: not JSON: .*; in a \.json file that is no array each line is a row"
    ):
        read(path)
    with pytest.raises(DataError, match=r"not JSON: Unterminated string starting at column 14$"):
        read(write(tmp_path / "b.jsonl", '{"messages": "'[:14] + "\n"))


@pytest.mark.parametrize("keys", [{}, {"prompt_column": "id"}])
def test_a_prompt_without_an_answer_says_which_column_would_hold_it(tmp_path: Path, keys: dict[str, str]) -> None:
    path = write(tmp_path / "a.jsonl", lines({"prompt": "Hi", "id": "3", "response": "Hello"}))
    assert [chat.lacks for chat in open_dataset(ChatFile(path=path, **keys))()] == ["completion"]
    assert [chat.lacks for chat in open_dataset(ChatFile(path=path, completion_column="response"))()] == [""]


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": "\xff"}')
    with pytest.raises(DataError, match="is not UTF-8"):
        read(tmp_path / "a.jsonl")


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", "PAR1 or not")
    with pytest.raises(DataError, match=r"a\.parquet is not a Parquet file"):
        read(path)


def test_missing_columns_of_a_parquet_file_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1: no column 'messages'.*columns found: text, label"):
        read(tmp_path / "a.parquet")


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="is empty"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "no such file or directory"),
        ("notes.txt", "unknown kind; known: .json"),
        ("", "no file of the"),
    ],
)
def test_a_path_without_data_is_refused_before_reading(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path / "notes.txt", "x")
    with pytest.raises(DataError, match=message):
        open_dataset(ChatFile(path=tmp_path / name))


CUSTOM = """
opened = []
def reader(name, *, count=1):
    opened.append(name)
    for _ in range(count):
        yield [{"role": "user", "content": name}, {"role": "assistant", "content": "ok"}]
def number(): return 3
"""


@pytest.fixture(scope="module")
def custom_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("custom")
    write(directory / "kdmesh_custom_reader.py", CUSTOM)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield "kdmesh_custom_reader"


def custom(module: str, function: str, **params: object) -> CustomDataset:
    return CustomDataset(format="custom", target=f"{module}:{function}", params=params)


def test_a_path_that_nobody_may_look_at_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"cannot read .*: File name too long"):
        open_dataset(ChatFile(path=tmp_path / f"{'x' * 300}.jsonl"))

    def refuse(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied")  # root may look at everything

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=f"cannot read {tmp_path}: Permission denied"):
        open_dataset(ChatFile(path=tmp_path))


def test_a_custom_reader_is_resolved_at_once_and_run_later(custom_module: str) -> None:
    dataset = open_dataset(custom(custom_module, "reader", name="x", count=2))
    import kdmesh_custom_reader as module  # type: ignore[import-not-found]

    assert module.opened == []
    for _ in range(2):  # each call starts anew
        assert [chat.messages[0].content for chat in dataset()] == ["x", "x"]


def test_a_custom_reader_is_checked_before_it_runs(custom_module: str) -> None:
    with pytest.raises(ConfigError, match="unknown params: limit; missing params: name"):
        open_dataset(custom(custom_module, "reader", limit=3))
    with pytest.raises(ConfigError, match="has no function 'absent'"):
        open_dataset(custom(custom_module, "absent"))


def test_what_a_custom_reader_gives_is_checked(custom_module: str) -> None:
    with pytest.raises(DataError, match="must return an iterable of chats, not int"):
        list(open_dataset(custom(custom_module, "number"))())
    with pytest.raises(DataError, match="kdmesh_custom_reader:reader is empty"):
        list(open_dataset(custom(custom_module, "reader", name="x", count=0))())
    with pytest.raises(DataError, match=r"chat 1\[0\]\.content must be a string, not int"):
        list(open_dataset(custom(custom_module, "reader", name=3))())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "from", "value", "type", "text", "instruction", "output"]),
            inner | st.sampled_from(["user", "assistant", "human", "text"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_row_is_either_a_chat_or_refused(row: object) -> None:
    try:
        chat = chat_from_row(row, column="messages", origin="here")
    except DataError as error:
        assert str(error).startswith("here")
    else:
        assert chat.messages
