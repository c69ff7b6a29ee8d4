"""Several teachers are asked as one: each for its own sequences, or every one for all of them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.chats.chat_rows import TeacherColumns
from kdmesh.errors import DataError, Unavailable
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.sides import Addressed, InContext, addressed, first_rows, teacher_side
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.sections.data_config import ChatFile
from kdmesh_trainer.sources.batches import PanelRows
from kdmesh_trainer.sources.early_rows import EarlyRows
from kdmesh_trainer.sources.panel import EarlyPanel, Panel


@dataclass(eq=False)
class Rows:
    rows_RD: torch.Tensor
    weight_version: int = 1


@dataclass(eq=False)
class Pending:
    rows: Rows | None
    has_failed: bool = False
    is_done: bool = True

    def wait(self) -> Rows:
        rows, self.rows = self.rows, None
        if rows is None:
            raise Unavailable("the teacher is gone")
        return rows


@dataclass
class Teacher:
    """Answers every position with the token it predicts."""

    is_broken: bool = False
    answered: list[weakref.ref[Rows]] = field(default_factory=list)
    asked: int = 0

    def submit(self, sequences: Sequence[TokenSequence], *, keep: bool = False) -> Pending:
        self.asked += len(sequences)
        labels = np.concatenate([sequence.labels for sequence in sequences])
        rows = Rows(torch.from_numpy(labels).unsqueeze(1))
        self.answered.append(weakref.ref(rows))
        return Pending(None if self.is_broken else rows)


def sequence(number: int) -> TokenSequence:
    length = 3 + number % 4
    return TokenSequence(
        token_ids=np.arange(100 * number, 100 * number + length, dtype=np.int32),
        positions=np.arange(number % 2, length - 1, dtype=np.int32),
    )


@given(st.lists(st.sampled_from(["code", "maths", "law"]), min_size=1, max_size=9))
def test_each_teacher_is_asked_for_its_own_and_every_row_finds_its_place(names: list[str]) -> None:
    teachers = {name: Teacher() for name in ("code", "maths", "law")}
    asked = [addressed(sequence(number), name) for number, name in enumerate(names)]
    rows = Panel(teachers, asks_all=False).submit(asked).wait()
    labels = torch.from_numpy(np.concatenate([each.labels for each in asked]))
    found = torch.full_like(labels, -1)
    for part in rows.parts:
        own = [each for each, name in zip(asked, names, strict=True) if name == part.name]
        assert part.num_tokens == sum(each.num_tokens for each in own)
        assert (part.index_R is None) == (len(own) == len(asked))
        found[slice(None) if part.index_R is None else part.index_R] = part.rows.rows_RD[:, 0]
    assert torch.equal(found, labels)
    assert {part.name for part in rows.parts} == set(names)
    assert [teachers[name].asked for name in teachers] == [names.count(name) for name in teachers]


def test_to_be_mixed_every_teacher_is_asked_for_all() -> None:
    teachers = {"code": Teacher(), "maths": Teacher()}
    rows = Panel(teachers, asks_all=True).submit([sequence(1), sequence(2)]).wait()
    assert [(part.name, part.index_R, len(part.rows.rows_RD)) for part in rows.parts] == [
        ("code", None, 7 - 1),
        ("maths", None, 7 - 1),
    ]
    assert torch.equal(rows.parts[0].rows.rows_RD, rows.parts[1].rows.rows_RD)


def test_rows_that_were_waited_for_belong_to_the_caller_alone() -> None:
    teachers = {"code": Teacher(), "maths": Teacher()}
    pending = Panel(teachers, asks_all=True).submit([sequence(1)])
    rows: PanelRows | None = pending.wait()
    answered = [ref for teacher in teachers.values() for ref in teacher.answered]
    assert rows is not None
    assert all(ref() is not None for ref in answered)
    rows = None
    assert all(ref() is None for ref in answered)


def test_early_samples_are_asked_of_their_own_teacher_and_not_again() -> None:
    teachers = {"code": Teacher(), "maths": Teacher()}
    early = {name: EarlyRows(one, most_rows=100, is_frozen=False) for name, one in teachers.items()}
    panel = EarlyPanel(early, asks_all=False)
    first, second, elsewhere = (addressed(sequence(n), name) for n, name in ((1, "code"), (2, "maths"), (3, "maths")))
    for sample in (first, second, elsewhere):
        panel.add(0, sample)
    assert [one.asked for one in teachers.values()] == [0, 0]
    panel.allow(1)
    assert [one.asked for one in teachers.values()] == [1, 2]
    panel.settle(0, [second, first])
    rows = panel.submit([second, first]).wait()
    assert {part.name: part.rows.rows_RD[:, 0].tolist() for part in rows.parts} == {
        "code": first.labels.tolist(),
        "maths": second.labels.tolist(),
    }
    assert [one.asked for one in teachers.values()] == [1, 2]
    panel.close()
    panel.add(0, first)
    assert teachers["code"].asked == 1


def test_early_samples_that_are_mixed_are_asked_of_all() -> None:
    teachers = {"code": Teacher(), "maths": Teacher()}
    panel = EarlyPanel(
        {name: EarlyRows(one, most_rows=100, is_frozen=True) for name, one in teachers.items()}, asks_all=True
    )
    panel.add(0, sequence(1))
    assert [one.asked for one in teachers.values()] == [1, 1]
    assert len(panel.submit([sequence(1)]).wait().parts) == 2
    assert [one.asked for one in teachers.values()] == [1, 1]


def test_a_teacher_that_fails_fails_the_group_and_the_others_rows_go() -> None:
    teachers = {"code": Teacher(), "maths": Teacher(is_broken=True)}
    pending = Panel(teachers, asks_all=True).submit([sequence(1)])
    with pytest.raises(Unavailable, match="the teacher is gone"):
        pending.wait()
    assert teachers["code"].answered[0]() is None


def test_a_sequence_keeps_its_teacher_when_it_is_cut_and_in_context() -> None:
    plain, pair = (
        sequence(2),
        InContext(token_ids=sequence(2).token_ids, positions=sequence(2).positions, teacher=sequence(2)),
    )
    for whole in (plain, pair):
        [theirs] = teacher_side([first_rows(addressed(whole, "law"), 1)])
        assert isinstance(theirs, Addressed)
        assert (theirs.teacher_name, theirs.num_rows) == ("law", 1)


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
COLUMNS = TeacherColumns(name="who", known_names=("code", "maths"))


def read(path: Path) -> list[str]:
    return [chat.teacher_name for chat in open_dataset(ChatFile(path=path), teacher=COLUMNS)()]


def test_the_column_names_the_teacher_of_each_row(tmp_path: Path) -> None:
    rows = [{**CHAT, "who": "maths"}, {**CHAT, "who": "code"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path) == ["maths", "code"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["maths", "code"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (CHAT, "a.jsonl:2: no column 'who', which data.teacher_column names; known: code, maths"),
        ({**CHAT, "who": None}, "a.jsonl:2: no column 'who'"),
        ({**CHAT, "who": "law"}, "a.jsonl:2: who: there is no teacher 'law'; known: code, maths"),
        ({**CHAT, "who": ["code"]}, "there is no teacher ['code']"),
    ],
)
def test_a_row_without_a_known_teacher_is_refused_by_its_place(tmp_path: Path, row: object, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [{**CHAT, "who": "code"}, row])))
    with pytest.raises(DataError) as refused:
        read(path)
    assert reason in str(refused.value)
