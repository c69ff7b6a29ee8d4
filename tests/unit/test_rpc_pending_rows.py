"""Rows on their way to a thread that blocks for them."""

from __future__ import annotations

import concurrent.futures

import pytest
import torch

from kdmesh.errors import InvalidRequest, Unavailable
from kdmesh.rpc.teachers.client import TeacherRows
from kdmesh.rpc.teachers.pending_rows import ArrivedRows, PendingRows

Future = concurrent.futures.Future[ArrivedRows]


def arrived(rows: int = 3) -> ArrivedRows:
    return ArrivedRows(TeacherRows(rows_RD=torch.arange(rows * 2.0).view(rows, 2), weight_version=1, is_borrowed=True))


def test_waiting_returns_the_rows() -> None:
    future = Future()
    pending = PendingRows(future)
    assert not pending.is_done
    future.set_result(arrived())
    assert pending.is_done
    assert pending.wait().rows_RD.shape == (3, 2)


def test_rows_are_given_out_once() -> None:
    future = Future()
    future.set_result(arrived())
    pending = PendingRows(future)
    pending.wait()
    with pytest.raises(RuntimeError, match="taken before"):
        pending.wait()


def test_errors_come_to_who_waits() -> None:
    future = Future()
    future.set_exception(InvalidRequest("why"))
    with pytest.raises(InvalidRequest, match="why"):
        PendingRows(future).wait()


def test_cancelled_request_is_unavailable() -> None:
    future = Future()
    future.cancel()
    with pytest.raises(Unavailable):
        PendingRows(future).wait()


def test_only_what_is_known_to_fail_has_failed() -> None:
    under_way, answered, refused, cancelled = (Future() for _ in range(4))
    answered.set_result(arrived())
    refused.set_exception(InvalidRequest("why"))
    cancelled.cancel()
    pending = [PendingRows(future) for future in (under_way, answered, refused, cancelled)]
    assert [rows.has_failed for rows in pending] == [False, False, True, True]


def test_request_that_nobody_refers_to_is_cancelled() -> None:
    future = Future()
    pending = PendingRows(future)
    del pending
    assert future.cancelled()


def test_moved_rows_are_equal_and_other_memory() -> None:
    rows = arrived()
    original_RD = rows._rows.rows_RD if rows._rows is not None else None
    assert rows.move()
    moved = rows.take()
    assert original_RD is not None
    assert torch.equal(moved.rows_RD, original_RD)
    assert moved.rows_RD.data_ptr() != original_RD.data_ptr()
    assert not moved.is_borrowed
    assert not rows.move()  # they are taken
