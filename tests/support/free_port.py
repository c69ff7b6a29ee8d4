"""A port for a server that is to be started."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port that nobody listens on now, so that a client may be told of a server before there is one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
