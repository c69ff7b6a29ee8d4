"""How a scheduler process of SGLang tells the server that started it that it is there."""

from __future__ import annotations

import pkgutil
import socket
from collections.abc import Mapping
from pathlib import Path

from sglang.srt.runtime_context import get_parallel

from kdmesh.sglang.messages import Hello, pack
from kdmesh.unix_path import unix_address


def report(socket_path: str, originals: Mapping[str, object], *, writes: bool) -> socket.socket:
    """Say Hello; what the server says from then on comes through the socket returned.

    Args:
        socket_path: where the server listens.
        originals: by dotted name, the functions of SGLang that hooks were registered for, as they were before.
        writes: whether the server is to show this process the segments that rows go to.
    """
    parallel = get_parallel()
    stage = f", stage {parallel.pp_rank}" if parallel.pp_size > 1 else ""
    hello = Hello(
        rank=f"tensor {parallel.tp_rank}, data {parallel.dp_rank or 0}{stage}",
        writes=writes,
        unhooked=[target for target, original in originals.items() if pkgutil.resolve_name(target) is original],
    )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with unix_address(Path(socket_path)) as address:
        sock.connect(address)
    sock.send(pack(hello))
    return sock
