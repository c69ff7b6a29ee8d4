"""Runs a test's function on every rank of a small job, one process each.

The processes are copies of one that has loaded torch, transformers and the trainer, because loading them takes longer
than most tests. Whatever a rank's function returns comes back as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from kdmesh_trainer.mesh import joined

_LOADED = (
    "tests.support.trainer_parts",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "torch._dynamo",  # which the first step of an optimizer loads
)


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


def start_ranks_of(target: str, *, ranks: int, context: int = 1, **arguments: Any) -> list[Rank]:
    """`target` ("module:function") on each of `ranks` gloo ranks, started; `context` of them hold each row together."""
    return [_Copy(target, arguments, context, environment) for environment in _environments(ranks)]


class _Copy:
    """A rank that is a copy of the process that has loaded everything."""

    def __init__(self, target: str, arguments: Mapping[str, Any], context: int, environment: Mapping[str, str]) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._files = [Path(self._directory.name) / name for name in ("output", "errors")]
        self._process = _loaded().Process(
            target=_be_rank, args=(target, dict(arguments), context, dict(environment), self._files)
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired("a rank", timeout or 0)
        output, errors = (file.read_text() if file.exists() else "" for file in self._files)
        self._directory.cleanup()
        return output, errors

    def kill(self) -> None:
        self._process.kill()


@cache
def _loaded() -> ForkServerContext:
    """Makes copies of a process that has loaded everything, and has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LOADED))
    from multiprocessing import forkserver

    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when torch is loaded
        forkserver.ensure_running()
    return context


def _be_rank(
    target: str, arguments: Mapping[str, Any], context: int, environment: Mapping[str, str], files: list[Path]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in zip((sys.stdout, sys.stderr), files, strict=True):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    result = _call(target, arguments, context=context)
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # as the trainer does: gloo's threads must not meet an interpreter that goes down


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
    port = _free_port()
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return [{**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _call(target: str, arguments: Mapping[str, Any], *, context: int = 1) -> Any:
    module, _, function = target.partition(":")
    with joined("cpu", longest_wait_s=60, context=context) as mesh:
        return getattr(import_module(module), function)(mesh, **arguments)
