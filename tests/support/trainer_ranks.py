"""Runs a test's function on every rank of a small job, one process each.

`python -m tests.support.trainer_ranks MODULE:FUNCTION ARGUMENTS_JSON` joins the ranks that the environment
describes and calls the function with the mesh and the arguments. Whatever it returns is printed as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib import import_module
from typing import Any

from kdmesh_trainer.mesh import joined


def run_ranks(target: str, *, ranks: int, **arguments: Any) -> list[Any]:
    """What `target` ("module:function") returns on each of `ranks` gloo ranks."""
    processes = start_ranks(["-m", "tests.support.trainer_ranks", target, json.dumps(arguments)], ranks=ranks)
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def start_ranks(arguments: list[str], *, ranks: int) -> list[subprocess.Popen[str]]:
    """Python with `arguments`, once per rank, in the environment that torchrun would give."""
    port = _free_port()
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Run one rank."""
    target, arguments = sys.argv[1], json.loads(sys.argv[2])
    module, _, function = target.partition(":")
    with joined("cpu", longest_wait_s=60) as mesh:
        result = getattr(import_module(module), function)(mesh, **arguments)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
