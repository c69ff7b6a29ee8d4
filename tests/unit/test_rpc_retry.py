"""Waits grow to a bound, are spread, and respect what the server asked for."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kdmesh.rpc.retry import Deadline, RetryPolicy


@given(st.integers(0, 10_000), st.floats(0, 100))
def test_waits_are_bounded_by_policy_and_request(attempt: int, asked_s: float) -> None:
    policy = RetryPolicy(first_s=0.1, longest_s=2.0, factor=2.0, jitter=0.25)
    wait_s = policy.wait_s(attempt, at_least_s=asked_s)
    assert max(asked_s, 0.1) <= wait_s <= max(asked_s, 2.0) * 1.25


def test_waits_grow() -> None:
    waits = [RetryPolicy(jitter=0.0).wait_s(attempt) for attempt in range(7)]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_clients_do_not_return_together() -> None:
    assert len({RetryPolicy().wait_s(0) for _ in range(20)}) > 10


def test_deadline_never_has_negative_time_left() -> None:
    assert Deadline.after(-1).left_s == 0
    later = Deadline.after(60)
    lefts = [later.left_s for _ in range(3)]
    assert all(60 >= a >= b > 59 for a, b in itertools.pairwise(lefts))
