"""Signals that end a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from kdmesh_trainer import stop
from kdmesh_trainer.stop import StopSignals

KILLED_BY_THE_SECOND = """
import os, signal
from kdmesh_trainer import stop
stop._SAME_WISH_S = -1.0
with stop.StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never reached", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_only_remembered(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.is_asked
        os.kill(os.getpid(), number)
        assert signals.is_asked
    assert signal.getsignal(number) is before


def test_the_same_wish_told_twice_is_one() -> None:
    assert stop._SAME_WISH_S > 0
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.is_asked


def test_a_second_signal_kills() -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED_BY_THE_SECOND], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGINT
    assert ended.stdout == "still here\n"


def test_what_is_waited_for_when_patience_ends_is_given_up_again_and_again() -> None:
    given_up: list[int] = []
    is_twice = threading.Event()

    def give_up() -> None:
        given_up.append(len(given_up))
        if len(given_up) == 2:
            is_twice.set()

    with StopSignals(patience_s=0.0) as signals:
        signals.at_last(give_up)
        assert not is_twice.wait(3 * stop._LOOK_EVERY_S)
        assert not given_up  # nobody has asked for it
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_twice.wait(60)


def test_a_run_that_ends_in_time_gives_nothing_up() -> None:
    given_up: list[int] = []
    with StopSignals(patience_s=3600.0) as signals:
        signals.at_last(lambda: given_up.append(1))
        os.kill(os.getpid(), signal.SIGTERM)
    assert not given_up


def test_a_run_that_is_to_end_by_itself_gives_nothing_up_any_more() -> None:
    given_up: list[int] = []
    with StopSignals(patience_s=0.0) as signals:
        signals.at_last(lambda: given_up.append(1))
        signals.give_nothing_up()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.is_asked
    assert not given_up
