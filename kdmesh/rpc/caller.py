"""Who makes the call that is being answered."""

from __future__ import annotations

from contextvars import ContextVar

from kdmesh.auth.identity import ANYBODY, Identity

# Every rpc is answered in a task of its own, so nobody sees another's.
_caller: ContextVar[Identity] = ContextVar("caller", default=ANYBODY)


def enter(identity: Identity) -> None:
    """What this task, and those that it starts, do from now on is asked for by `identity`."""
    _caller.set(identity)


def caller_name() -> str:
    """The name of whoever calls; empty where nobody asked who it is."""
    return _caller.get().name
