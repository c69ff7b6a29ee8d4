"""Rows of samples that are asked for as the samples come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from kdmesh.errors import InvalidRequest, ModelMismatch
from kdmesh.types import TokenSequence
from kdmesh_trainer.sources.early_rows import EarlyRows

ROWS = 3


def sequence(first: int) -> TokenSequence:
    return TokenSequence(
        token_ids=np.arange(first, first + ROWS + 1, dtype=np.int32), positions=np.arange(ROWS, dtype=np.int32)
    )


def rows_of(sequences: Sequence[TokenSequence]) -> Tensor:
    """One column: the label of every row."""
    return torch.from_numpy(np.concatenate([s.labels for s in sequences])).float()[:, None]


@dataclass
class Rows:
    rows_RD: Tensor
    weight_version: int
    has_failed: bool = False
    on_wait: Callable[[], None] = lambda: None

    def wait(self) -> Rows:
        assert not self.has_failed
        self.on_wait()
        return self


@dataclass
class Teacher:
    """Answers at once, and remembers what it was asked."""

    version: int = 1
    is_failing: bool = False
    asked: list[tuple[list[int], bool]] = field(default_factory=list)  # first ids of a group, and whether it is kept
    waited_for: list[tuple[list[int], bool]] = field(default_factory=list)  # the same, in the order of the waits

    def submit(self, sequences: Sequence[TokenSequence], *, keep: bool = False) -> Rows:
        if any(s.num_tokens > ROWS + 1 for s in sequences):
            raise InvalidRequest("too long")
        group = [int(s.token_ids[0]) for s in sequences], keep
        self.asked.append(group)
        return Rows(rows_of(sequences), self.version, self.is_failing, lambda: self.waited_for.append(group))


def early_rows(teacher: Teacher, *, most_rows: int = 100, is_frozen: bool = True) -> EarlyRows:
    return EarlyRows(teacher, most_rows=most_rows, is_frozen=is_frozen)


def test_a_sample_is_asked_for_as_it_comes_and_not_again() -> None:
    teacher = Teacher()
    early = early_rows(teacher)
    early.add(0, sequence(5))
    early.add(0, sequence(9))
    assert teacher.asked == [([5], True), ([9], True)]
    group = [sequence(9), sequence(5)]
    assert torch.equal(early.submit(group).wait().rows_RD, rows_of(group))
    assert len(teacher.asked) == 2


def test_what_did_not_come_here_is_asked_for_in_one_request_and_lies_in_its_place() -> None:
    teacher = Teacher()
    early = early_rows(teacher)
    early.add(0, sequence(5))
    group = [sequence(1), sequence(5), sequence(2)]
    rows = early.submit(group).wait()
    assert torch.equal(rows.rows_RD, rows_of(group))
    assert rows.weight_version == 1
    assert teacher.asked == [([5], True), ([1, 2], False)]


def test_no_slot_is_held_while_rows_that_are_kept_are_waited_for() -> None:
    teacher = Teacher()
    early = early_rows(teacher)
    early.add(0, sequence(5))
    early.submit([sequence(9), sequence(5)]).wait()
    assert teacher.waited_for == [([5], True), ([9], False)]  # of these the second lie in memory of the teacher


def test_equal_samples_have_rows_of_their_own() -> None:
    teacher = Teacher()
    early = early_rows(teacher)
    early.add(0, sequence(5))
    early.add(0, sequence(5))
    group = [sequence(5)] * 3
    assert torch.equal(early.submit(group).wait().rows_RD, rows_of(group))
    assert teacher.asked == [([5], True), ([5], True), ([5], False)]


def test_no_more_rows_are_asked_for_than_there_is_room() -> None:
    teacher = Teacher()
    early = early_rows(teacher, most_rows=2 * ROWS)
    for first in range(4):
        early.add(0, sequence(first))
    assert [asked for asked, _ in teacher.asked] == [[0], [1]]
    early.submit([sequence(0)]).wait()
    assert [asked for asked, _ in teacher.asked] == [[0], [1], [2]]
    assert torch.equal(early.submit([sequence(3)]).wait().rows_RD, rows_of([sequence(3)]))


def test_what_another_rank_trains_on_makes_room_and_is_not_asked_for_later() -> None:
    teacher = Teacher()
    early = early_rows(teacher, most_rows=2 * ROWS)
    for first in range(4):
        early.add(0, sequence(first))
    early.add(1, sequence(8))
    early.settle(0, [sequence(1), sequence(7)])
    assert [asked for asked, _ in teacher.asked] == [[0], [1], [8]]
    early.submit([sequence(1), sequence(7)]).wait()
    assert [asked for asked, _ in teacher.asked[3:]] == [[7]]


def test_a_following_teacher_is_asked_only_for_steps_that_it_has_the_weights_for() -> None:
    teacher = Teacher()
    early = early_rows(teacher, is_frozen=False)
    early.add(3, sequence(3))
    early.add(2, sequence(2))
    assert teacher.asked == []
    early.allow(3)
    assert teacher.asked == [([2], True)]
    early.settle(2, [])
    teacher.version = 2
    early.allow(6)
    assert early.submit([sequence(3)]).wait().weight_version == 2
    assert teacher.asked == [([2], True), ([3], True)]


def test_an_answer_that_failed_early_is_asked_for_again() -> None:
    teacher = Teacher(is_failing=True)
    early = early_rows(teacher)
    early.add(0, sequence(5))
    teacher.is_failing = False
    assert torch.equal(early.submit([sequence(5)]).wait().rows_RD, rows_of([sequence(5)]))


def test_a_sample_beyond_the_teachers_limits_is_refused_when_it_is_submitted() -> None:
    early = early_rows(Teacher())
    long = TokenSequence(token_ids=np.arange(9, dtype=np.int32), positions=np.arange(3, dtype=np.int32))
    early.add(0, long)
    with pytest.raises(InvalidRequest, match="too long"):
        early.submit([long])


def test_rows_of_other_weights_are_never_joined() -> None:
    teacher = Teacher()
    early = early_rows(teacher)
    early.add(0, sequence(5))
    teacher.version = 2
    with pytest.raises(ModelMismatch, match=r"versions \[1, 2\]"):
        early.submit([sequence(5), sequence(6)]).wait()


def test_nothing_is_asked_for_after_the_end() -> None:
    teacher = Teacher()
    early = early_rows(teacher)
    early.close()
    early.add(0, sequence(5))
    assert teacher.asked == []
