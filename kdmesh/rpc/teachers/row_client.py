"""Who wants a private group with this server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Who wants a group.

    Attributes:
        host: its address.
        check: raises HandleGone for a session that is not its own.
        busy: around whatever is sent to it.
        sent: called with the number of bytes that it got.
    """

    host: str
    check: Callable[[bytes], object]
    busy: AbstractContextManager[object]
    sent: Callable[[int], None]
