"""Rows that do not come."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from kdmesh.errors import DeadlineExpired, ModelMismatch, RpcError
from kdmesh.losses import OutputHead
from kdmesh.types import TokenSequence
from kdmesh_trainer.sources.batches import CopiedRows
from kdmesh_trainer.sources.outage import LenientHead, LenientRows, Outage

COLUMNS = 3


def sequence(*, rows: int) -> TokenSequence:
    return TokenSequence(token_ids=np.arange(rows + 1, dtype=np.int32), positions=np.arange(rows, dtype=np.int32))


class Teacher:
    """Answers with ones, until something is wrong."""

    def __init__(self) -> None:
        self.error: RpcError | None = None
        self.version = self.head_version = 7
        self.kept: list[bool] = []

    def submit(self, sequences: Sequence[TokenSequence], *, keep: bool = False) -> Pending:
        self.kept.append(keep)
        return Pending(self, sum(each.num_rows for each in sequences))

    def blank_rows(self, num_rows: int) -> CopiedRows:
        return CopiedRows(rows_RD=torch.zeros(num_rows, COLUMNS), weight_version=self.version)

    def head(self) -> tuple[OutputHead, int]:
        if self.error is not None:
            raise self.error
        return OutputHead(weight_VD=torch.ones(2, COLUMNS)), self.head_version

    def blank_head(self) -> tuple[OutputHead, int]:
        return OutputHead(weight_VD=torch.zeros(2, COLUMNS)), self.version

    @property
    def weight_version(self) -> int:
        return self.version


class Pending:
    def __init__(self, teacher: Teacher, count: int) -> None:
        self._teacher = teacher
        self._count = count
        self.is_done = True

    @property
    def has_failed(self) -> bool:
        return self._teacher.error is not None

    def wait(self) -> CopiedRows:
        if self._teacher.error is not None:
            raise self._teacher.error
        rows_RD = torch.ones(self._count, COLUMNS, dtype=torch.bfloat16)
        return CopiedRows(rows_RD=rows_RD, weight_version=self._teacher.version)


def test_rows_that_come_are_the_teacher_s_own() -> None:
    teacher, outage = Teacher(), Outage()
    pending = LenientRows(teacher, outage).submit([sequence(rows=2), sequence(rows=3)], keep=True)
    assert pending.is_done and not pending.has_failed
    rows = pending.wait()
    assert rows.rows_RD.shape == (5, COLUMNS) and rows.rows_RD.sum() == 5 * COLUMNS
    assert teacher.kept == [True] and not outage.has_begun


def test_once_rows_do_not_come_all_are_blank_and_nobody_is_asked() -> None:
    teacher, outage = Teacher(), Outage()
    service = LenientRows(teacher, outage)
    service.submit([sequence(rows=1)]).wait()
    ahead = [service.submit([sequence(rows=rows)]) for rows in (2, 3)]
    teacher.error = DeadlineExpired("no teacher has answered")
    assert ahead[0].has_failed
    lost = ahead[0].wait()
    assert outage.has_begun
    teacher.error = ModelMismatch("this is not why")
    later = service.submit([sequence(rows=4)])
    for rows, count in ((lost, 2), (ahead[1].wait(), 3), (later.wait(), 4)):
        assert torch.equal(rows.rows_RD, torch.zeros(count, COLUMNS))
        assert rows.weight_version == 7
    assert later.is_done and not later.has_failed
    assert len(teacher.kept) == 3


def test_so_are_the_first_that_a_rank_waits_for_which_others_may_have() -> None:
    teacher, outage = Teacher(), Outage()
    teacher.error = DeadlineExpired("no teacher has answered")
    rows = LenientRows(teacher, outage).submit([sequence(rows=1)]).wait()
    assert outage.has_begun and not rows.rows_RD.any()


def test_blank_rows_are_of_the_weights_that_others_have_rows_of_now() -> None:
    teacher, outage = Teacher(), Outage()
    service = LenientRows(teacher, outage)
    assert service.submit([sequence(rows=1)]).wait().weight_version == 7
    teacher.version = 8  # it has followed the student
    pending = service.submit([sequence(rows=1)])
    teacher.error = DeadlineExpired("no teacher has answered")
    assert pending.wait().weight_version == 8


def test_a_head_that_comes_is_the_teacher_s_own() -> None:
    teacher, outage = Teacher(), Outage()
    head, version = LenientHead(teacher, outage).head()
    assert head.weight_VD.all() and version == 7 and not outage.has_begun


@pytest.mark.parametrize("why", ["it does not come", "it is of other weights"])
def test_without_the_head_of_its_rows_a_step_is_lost(why: str) -> None:
    teacher, outage = Teacher(), Outage()
    if why == "it does not come":
        teacher.error = DeadlineExpired("no teacher has answered")
    else:
        teacher.head_version = 3  # it was started anew
    service = LenientHead(teacher, outage)
    for _ in range(2):
        head, version = service.head()
        assert not head.weight_VD.any() and version == 7
        assert outage.has_begun


def test_where_rows_have_not_come_no_head_is_asked_for() -> None:
    teacher, outage = Teacher(), Outage()
    outage.begin(DeadlineExpired("no teacher has answered"))
    teacher.error = ModelMismatch("this is never heard")
    head, _ = LenientHead(teacher, outage).head()
    assert not head.weight_VD.any()


def test_neither_rows_nor_what_failed_are_held() -> None:
    teacher, outage = Teacher(), Outage()
    service = LenientRows(teacher, outage)
    pending = service.submit([sequence(rows=1)])
    rows = pending.wait()
    held = weakref.ref(rows.rows_RD)
    del rows
    assert held() is None
    lost = service.submit([sequence(rows=1)])
    asked = weakref.ref(lost._pending)  # type: ignore[attr-defined]
    teacher.error = DeadlineExpired("no teacher has answered")
    lost.wait()
    gc.collect()
    assert asked() is None
