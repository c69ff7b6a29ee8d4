"""Two gloo ranks of this machine, one thread each, as processes of a benchmark's own module."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from benchmarks.measure import say

RANKS = 2


def on_ranks(module: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """What each rank tells; it runs `module` with `arguments` and ends in `tell`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
    common = {**os.environ, **{key: str(value) for key, value in place.items()}}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


def tell(figures: Mapping[str, object]) -> NoReturn:
    """Ends this rank as the trainer does: gloo's threads must not meet an interpreter that goes down."""
    say(json.dumps(figures))
    os._exit(0)
