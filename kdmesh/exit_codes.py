"""What a command ends with when one of our errors ends it, said in one sentence."""

from __future__ import annotations

from kdmesh.errors import DeadlineExpired, Unavailable

REFUSED = 2
"""Something is wrong that the user, or who runs a server, can put right."""

AWAY = 3
"""A service did not answer in time: the same command may succeed later."""

TOLD = frozenset({REFUSED, AWAY})
"""Exit codes of processes that have said why."""


def exit_code(error: BaseException) -> int:
    """That of a command which `error`, or what caused it, ends."""
    is_away = any(isinstance(each, Unavailable | DeadlineExpired) for each in (error, error.__cause__))
    return AWAY if is_away else REFUSED
