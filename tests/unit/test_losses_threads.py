"""Elementwise work on several threads leaves no trace on the threads that asked for it."""

from __future__ import annotations

import multiprocessing
import threading
from multiprocessing.connection import Connection

import pytest
import torch

from kdmesh.losses.threads import run_each


def test_results_come_in_the_order_of_the_tasks() -> None:
    second_began = threading.Event()

    def first() -> str:
        second_began.wait()  # so the tasks do run at the same time
        return "first"

    def second() -> str:
        second_began.set()
        return "second"

    assert run_each([first, second]) == ["first", "second"]


def test_a_single_task_stays_on_the_callers_thread() -> None:
    assert run_each([threading.current_thread]) == [threading.current_thread()]


def test_operators_there_use_one_core_and_here_as_many_as_before() -> None:
    before = torch.get_num_threads()
    assert run_each([torch.get_num_threads] * 3) == [1, 1, 1]
    assert torch.get_num_threads() == before
    late: list[int] = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [before]


def test_nothing_there_is_followed_by_autograd() -> None:
    leaf = torch.ones(3, requires_grad=True)
    assert torch.is_grad_enabled()
    assert not any(result.requires_grad for result in run_each([lambda: leaf * 2] * 2))


def test_an_error_comes_out_after_all_tasks_have_ended() -> None:
    may_end, ended = threading.Event(), threading.Event()

    def fails() -> None:
        may_end.set()
        raise ValueError("as it happens")

    def goes_on() -> None:
        may_end.wait()
        ended.set()

    with pytest.raises(ValueError, match="as it happens"):
        run_each([fails, goes_on])
    assert ended.is_set()


def _child(answers: Connection) -> None:
    answers.send(run_each([lambda: 1, lambda: 2]))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    run_each([lambda: 1, lambda: 2])
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs,))
    child.start()
    assert ours.poll(30)
    assert ours.recv() == [1, 2]
    child.join(30)
    assert child.exitcode == 0
