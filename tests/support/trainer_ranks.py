"""Runs a test's function, or the trainer, on every rank of a small job, one process each.

Whatever a rank's function returns comes back as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from kdmesh_trainer.mesh import joined
from tests.support.copies import Copy, copy_of_module
from tests.support.free_port import free_port


def run_ranks(target: str, *, ranks: int, context: int = 1, within_s: float = 100, **arguments: Any) -> list[Any]:
    """What `target` ("module:function") returns on each of `ranks` gloo ranks; a single one is this process."""
    if ranks == 1:
        return [_call(target, arguments)]
    processes = start_ranks_of(target, ranks=ranks, context=context, **arguments)
    outcomes = finish(processes, within_s=within_s)
    for outcome in outcomes:
        assert outcome.exit_code == 0, outcome.errors
    return [json.loads(outcome.output.splitlines()[-1]) for outcome in outcomes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a rank ended."""

    exit_code: int
    output: str
    errors: str


class Rank(Protocol):
    """A process of a job, as of subprocess."""

    @property
    def returncode(self) -> Any:
        """None as long as it runs."""
        ...

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, when it has ended."""
        ...

    def kill(self) -> None:
        """End it."""
        ...


def finish(processes: Iterable[Rank], *, within_s: float = 100) -> list[Outcome]:
    """Waits for every rank; kills those that take longer."""
    outcomes = []
    for process in processes:
        try:
            output, errors = process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
        outcomes.append(Outcome(exit_code=process.returncode, output=output, errors=errors))
    return outcomes


def start_ranks_of(target: str, *, ranks: int, context: int = 1, **arguments: Any) -> list[Copy]:
    """`target` ("module:function") on each of `ranks` gloo ranks, started; `context` of them hold each row together."""
    return [Copy(_call, target, arguments, context, environment=environment) for environment in _environments(ranks)]


def start_trainers(*arguments: str, ranks: int) -> list[Copy]:
    """The trainer with `arguments`, once per rank, in the environment that torchrun would give."""
    return [
        copy_of_module("kdmesh_trainer", *arguments, environment=environment) for environment in _environments(ranks)
    ]


def start_ranks(arguments: list[str], *, ranks: int) -> list[subprocess.Popen[str]]:
    """Python with `arguments`, once per rank, in the environment that torchrun would give."""
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in _environments(ranks)
    ]


def _environments(ranks: int) -> list[dict[str, str]]:
    port = free_port()
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return [{**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _call(target: str, arguments: Mapping[str, Any], context: int = 1) -> Any:
    module, _, function = target.partition(":")
    with joined("cpu", longest_wait_s=60, context=context) as mesh:
        return getattr(import_module(module), function)(mesh, **arguments)
