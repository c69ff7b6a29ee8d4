"""Where ranks hold rows of tokens together, each sequence is asked for once and every rank gets what it needs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmesh.errors import ModelMismatch
from kdmesh.models.context import ContextGroup
from kdmesh.models.packing import pack, slice_of
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.sides import InContext, addressed, teacher_side
from kdmesh_trainer.sources.batches import PanelRows
from kdmesh_trainer.sources.context_rows import ContextRows, asking
from kdmesh_trainer.sources.panel import Panel
from tests.support.context_threads import on_ranks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rows:
    rows_RD: torch.Tensor
    weight_version: int


class Teacher:
    """Answers every position with the token that it predicts; remembers how many tokens it read."""

    def __init__(self, *, versions: Sequence[int] = (3,), dtype: torch.dtype = torch.float32) -> None:
        """`versions` are those of its answers, in turn."""
        self.versions = versions
        self.dtype = dtype
        self.num_tokens = 0
        self._num_asked = 0
        self._lock = threading.Lock()  # ranks are threads

    def submit(self, sequences: Sequence[TokenSequence]) -> Pending:
        with self._lock:
            self.num_tokens += sum(sequence.num_tokens for sequence in sequences)
            version = self.versions[self._num_asked % len(self.versions)]
            self._num_asked += 1
        labels = torch.from_numpy(np.concatenate([s.labels for s in sequences])).to(self.dtype)
        return Pending(Rows(labels[:, None], version))


@dataclass(frozen=True)
class Pending:
    rows: Rows
    is_done: bool = True

    def wait(self) -> Rows:
        return self.rows


def sequences_of(lengths: Sequence[int], *, seed: int) -> tuple[TokenSequence, ...]:
    """Every token is another, so that a row says whose it is."""
    random = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths[:-1]])
    return tuple(
        TokenSequence(
            token_ids=np.arange(start, start + length, dtype=np.int32),
            positions=np.sort(random.permutation(length - 1)[: random.integers(1, length)]).astype(np.int32),
        )
        for start, length in zip(starts, lengths, strict=True)
    )


def held_labels(sequences: Sequence[TokenSequence], context: ContextGroup) -> list[int]:
    """What the rows of this rank's slice predict."""
    labels: list[int] = slice_of(pack(sequences), place=context.place, size=context.size).labels_R.tolist()
    return labels


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=6),
    size=st.integers(2, 4),
    seed=st.integers(0, 100),
    homes=st.lists(st.none() | st.integers(0, 3), min_size=6, max_size=6),
)
def test_each_sequence_is_asked_for_once_and_each_rank_gets_the_rows_of_its_tokens(
    lengths: list[int], size: int, seed: int, homes: list[int | None]
) -> None:
    sequences, teacher = sequences_of(lengths, seed=seed), Teacher(dtype=torch.bfloat16)
    wanted = [home if home is not None and home < size else None for home in homes[: len(lengths)]]

    def share(context: ContextGroup) -> tuple[tuple[TokenSequence, ...], list[int]]:
        rows = ContextRows(context, CPU, names=[""])
        micro_batch = asking(sequences, teacher.submit, rows, homes=wanted)
        assert micro_batch.asked is not None and micro_batch.teacher is not None
        answer = micro_batch.teacher.wait()
        assert not isinstance(answer, PanelRows)
        assert answer.weight_version == 3
        expected = held_labels(sequences, context)
        assert answer.rows_RD[:, 0].tolist() == torch.tensor(expected).bfloat16().tolist()
        assert micro_batch.held is not None
        assert [label for s in micro_batch.held for label in s.labels.tolist()] == expected
        held = rows.held(sequences)
        assert np.concatenate([s.labels for s in sequences])[held].tolist() == expected
        for home, sequence in zip(wanted, sequences, strict=True):
            if home is not None:
                assert (sequence in micro_batch.asked) == (home == context.place)
        return micro_batch.asked, expected

    shares = on_ranks(size, share)
    assert sorted(id(s) for asked, _ in shares for s in asked) == sorted(map(id, sequences))
    assert teacher.num_tokens == sum(lengths)
    assert sum(len(expected) for _, expected in shares) == sum(s.num_rows for s in sequences)


@pytest.mark.parametrize("asks_all", [False, True])
def test_several_teachers_rows_find_their_places(asks_all: bool) -> None:
    plain = sequences_of([9, 5, 14, 3, 8], seed=1)
    names = ["code", "maths", "code", "maths", "code"]
    sequences = tuple(addressed(sequence, name) for sequence, name in zip(plain, names, strict=True))
    teachers = {"code": Teacher(), "maths": Teacher(versions=(5,)), "idle": Teacher()}
    panel = Panel(teachers, asks_all=asks_all)
    taught = {token: name for sequence, name in zip(plain, names, strict=True) for token in sequence.token_ids.tolist()}

    def check(context: ContextGroup) -> int:
        micro_batch = asking(sequences, panel.submit, ContextRows(context, CPU, names=list(teachers)))
        assert micro_batch.teacher is not None
        rows, expected = micro_batch.teacher.wait(), np.array(held_labels(sequences, context))
        assert isinstance(rows, PanelRows)
        for part in rows.parts:
            index = slice(None) if part.index_R is None else part.index_R.numpy()
            assert part.rows.rows_RD[:, 0].tolist() == expected[index].tolist()
            assert part.rows.weight_version == (5 if part.name == "maths" else 3)
            if not asks_all:
                assert {taught[label] for label in expected[index].tolist()} <= {part.name}
        return sum(len(part.rows.rows_RD) for part in rows.parts)

    num_rows = sum(s.num_rows for s in plain)
    for size in (2, 3):
        assert sum(on_ranks(size, check)) == num_rows * (3 if asks_all else 1)


def test_rows_that_the_teacher_reads_elsewhere_belong_to_the_students_tokens() -> None:
    told = np.arange(100, 130, dtype=np.int32)
    sequences = tuple(
        InContext(
            token_ids=own.token_ids,
            positions=own.positions,
            teacher=TokenSequence(
                token_ids=np.concatenate([told, own.token_ids]), positions=(own.positions + 30).astype(np.int32)
            ),
        )
        for own in sequences_of([11, 6], seed=2)
    )
    teacher = Teacher()

    def check(context: ContextGroup) -> None:
        rows_of = ContextRows(context, CPU, names=[""])
        micro_batch = asking(sequences, lambda some: teacher.submit(teacher_side(some)), rows_of)
        assert micro_batch.teacher is not None
        rows = micro_batch.teacher.wait()
        assert not isinstance(rows, PanelRows)
        assert rows.rows_RD[:, 0].tolist() == held_labels(sequences, context)
        assert micro_batch.held is not None
        for held in micro_batch.held:
            assert isinstance(held, InContext)
            assert held.teacher.positions.tolist() == (held.positions + 30).tolist()

    on_ranks(2, check)
    assert teacher.num_tokens == 17 + 2 * 30


def test_ranks_of_a_group_never_mix_weight_versions() -> None:
    sequences, teacher = sequences_of([9, 9], seed=0), Teacher(versions=(1, 2))

    def check(context: ContextGroup) -> None:
        micro_batch = asking(sequences, teacher.submit, ContextRows(context, CPU, names=[""]))
        assert micro_batch.teacher is not None
        with pytest.raises(ModelMismatch, match=r"weight versions \[1, 2\]"):
            micro_batch.teacher.wait()

    on_ranks(2, check)


def test_a_blank_micro_batch_asks_nobody() -> None:
    def ask(context: ContextGroup) -> object:
        return asking((), Teacher().submit, ContextRows(context, CPU, names=[""])).teacher

    assert on_ranks(2, ask) == [None, None]
