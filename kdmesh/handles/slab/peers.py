"""The process at the other end of a Unix socket."""

from __future__ import annotations

import contextlib
import os
import socket

_SO_PEERPIDFD = 77


def peer_pidfd(sock: socket.socket, pid: int) -> int | None:
    """A new descriptor that becomes readable when the peer dies; None where there is none to be had.

    Args:
        sock: connected.
        pid: the peer's, from SO_PEERCRED; 0 when it lives in a process namespace that this one cannot see.
    """
    with contextlib.suppress(OSError):
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    if pid > 0:
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return None
