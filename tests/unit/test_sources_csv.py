"""CSV files give rows of texts, in pieces of any size, and are refused with the place and the rule."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdmesh.errors import DataError
from kdmesh_trainer.data.files import csv_files
from kdmesh_trainer.data.files.pieces import pieces_of, rows_of, size_of
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.sections.data_config import ChatFile, TextFile


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "PIECE_BYTES", 16)


def rows(path: Path) -> list[tuple[str, object]]:
    return [row for piece in pieces_of(path) for row in rows_of(piece, list)]


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


# The fixture is the same for every example. A lone carriage return ends no line of a file, but one of Python's texts.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(
    texts=st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)] * 2), max_size=12
    ),
    ends=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
)
def test_a_table_is_the_same_in_pieces_of_any_size(
    tmp_path: Path, small: None, texts: list[tuple[str, str]], ends: str, mark: bool
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=ends)
    writer.writerow(["prompt", "completion"])
    begins = []
    for pair in texts:
        begins.append(text.getvalue().count("\n") + 1)
        writer.writerow(pair)
    path = write(tmp_path / "a.csv", "\ufeff" * mark + text.getvalue())
    found = rows(path)
    assert [row for _, row in found] == [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    assert [origin for origin, _ in found] == [f"{path}:{line}" for line in begins]
    parts = list(pieces_of(path))
    assert sum(piece.size_bytes for piece in parts) == size_of(path) == path.stat().st_size
    assert [row for piece in reversed(parts) for row in reversed(list(rows_of(piece, list)))] == found[::-1]


def test_rows_of_a_table_are_chats_or_texts(tmp_path: Path) -> None:
    chats = write(tmp_path / "a.csv", 'id,prompt,completion,quality\n1,Hi,"Hello,\nyou ""there""",0.5\n\n2,a,b,1\n')
    read = list(open_dataset(ChatFile(path=chats, weight_column="quality"))())
    assert [[message.content for message in chat.messages] for chat in read] == [
        ["Hi", 'Hello,\nyou "there"'],
        ["a", "b"],
    ]
    assert [(chat.origin, chat.weight) for chat in read] == [(f"{chats}:2", 0.5), (f"{chats}:5", 1.0)]
    texts = write(tmp_path / "b.csv", "text\n" + "x" * 300_000 + "\n")
    assert [len(chat.text or "") for chat in open_dataset(TextFile(format="text", path=texts))()] == [300_000]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion\na,b\nc\n", r"a\.csv:3: 1 field, and the header has 2"),
        ("prompt,completion\na,b,c\n", r"a\.csv:2: 3 fields, and the header has 2"),
        ("prompt,prompt\na,b\n", r"a\.csv:1: a header must name each column once; found: prompt, prompt"),
        ("prompt,\na,b\n", r"a\.csv:1: a header must name each column once"),
        (
            "prompt;completion\na;b, c\n",
            r"a\.csv:1: fields are divided by commas, and not by semicolons; the header is 'p",
        ),
        ("prompt\tcompletion\na\tb\n", r"a\.csv:1: fields are divided by commas, and not by tabs"),
        ("", r"dataset .*a\.csv is empty"),
        ("prompt,completion\n", r"dataset .*a\.csv is empty"),
        ("\na,b\n", r"a\.csv:1: a header must name each column once; found: nothing"),
        ("question,answer\na,b\n", r"a\.csv:2: no column 'messages'.*columns found: question, answer"),
        ('prompt,completion\na,b\nc,"d\n', r"a\.csv:3: not CSV: unexpected end of data"),
        ('prompt,completion\na,"b"c\n', r"a\.csv:2: not CSV: ',' expected after '\"'"),
        ("prompt,completion\ra,b\r", r"a\.csv:1: not CSV: new-line character seen in unquoted field"),
    ],
)
def test_what_is_no_table_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(DataError, match=message):
        list(open_dataset(ChatFile(path=path))())


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\nabc\xff\n")
    with pytest.raises(DataError, match="is not UTF-8: invalid start byte at byte 8"):
        list(open_dataset(TextFile(format="text", path=tmp_path / "a.csv"))())
