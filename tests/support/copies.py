"""Processes that are copies of one that has loaded what jobs and servers are made of.

Loading torch, transformers and the trainer takes longer than most of what a test has such a process do. The original
has computed nothing. That a process comes up from nothing is what tests/system shows.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TextIO
from unittest import mock

from kdmesh.entry import main

_LOADED = (
    "tests.support.trainer_parts",
    "kdmesh_trainer.build",
    "kdmesh_trainer.memory.memory_plan",
    "kdmesh_teacher.lifecycle",
    "kdmesh_teacher.transformers_engine",
    "kdmesh_rollout.lifecycle",
    "kdmesh_rollout.transformers_engine",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "torch._dynamo",  # which the first step of an optimizer loads
)


class Copy:
    """A process that calls a function; of subprocess.Popen it has what tests use."""

    def __init__(self, call: Callable[..., object], *arguments: object, environment: Mapping[str, str]) -> None:
        """What the call returns is written to the standard output as JSON, behind what it wrote itself.

        Args:
            call: one of a module.
            environment: the process's whole environment. It works in this process's directory.
        """
        (output, output_end), (errors, errors_end) = (multiprocessing.Pipe(duplex=False) for _ in range(2))
        self.stdout, self.stderr = _text(output), _text(errors)
        self._process = _loaded().Process(
            target=_be_copy, args=(call, arguments, dict(environment), os.getcwd(), output_end, errors_end)
        )
        self._process.start()
        output_end.close()
        errors_end.close()
        self._said: tuple[Future[str], Future[str]] | None = None

    @property
    def returncode(self) -> int | None:
        """-n where signal n killed it; None as long as it runs."""
        return self._process.exitcode

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]:
        """The rest of what it wrote, to both streams, when it has ended. Raises subprocess.TimeoutExpired."""
        if self._said is None:
            readers = ThreadPoolExecutor(2)
            self._said = readers.submit(self.stdout.read), readers.submit(self.stderr.read)
            readers.shutdown(wait=False)
        output, errors = self._said
        try:
            said = output.result(timeout), errors.result(timeout)
        except TimeoutError as error:
            raise subprocess.TimeoutExpired("a copy", timeout or 0) from error
        self._process.join()
        self.stdout.close()
        self.stderr.close()
        return said

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self._process.exitcode is None:
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()

    def wait(self, within_s: float) -> int:
        """Return when it has ended: its exit code."""
        self._process.join(within_s)
        assert self._process.exitcode is not None, f"a copy still runs after {within_s} s"
        return self._process.exitcode


def copy_of_module(module: str, *arguments: str, environment: Mapping[str, str]) -> Copy:
    """`python -m module` with these arguments."""
    return Copy(_run_module, module, arguments, environment=environment)


@contextmanager
def serving(package: str, config: Path) -> Iterator[Copy]:
    """A server of that configuration, killed on exit if it still runs; its temporary files lie beside the file."""
    process = copy_of_module(package, str(config), environment={**os.environ, "TMPDIR": str(config.parent)})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def copy_of_kdmesh(*arguments: str) -> Copy:
    """`kdmesh` with these arguments; a program that it becomes is run by the copy, too."""
    return Copy(_run_kdmesh, arguments, environment=os.environ)


def _text(end: Connection) -> TextIO:
    descriptor = os.dup(end.fileno())
    end.close()
    return os.fdopen(descriptor, encoding="utf-8", errors="replace")


@cache
def _loaded() -> ForkServerContext:
    """Makes copies of a process that has loaded everything, and has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LOADED))
    from multiprocessing import forkserver

    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when torch is loaded
        forkserver.ensure_running()
    return context


def _be_copy(
    call: Callable[..., object],
    arguments: Sequence[object],
    environment: Mapping[str, str],
    directory: str,
    output: Connection,
    errors: Connection,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    tempfile.tempdir = None  # as the environment says
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for stream, end in ((sys.stdout, output), (sys.stderr, errors)):
        os.dup2(end.fileno(), stream.fileno())
        end.close()
    result = call(*arguments)
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # as the trainer does: gloo's threads must not meet an interpreter that goes down


def _run_module(module: str, arguments: Sequence[str]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_kdmesh(arguments: Sequence[str]) -> None:
    def become(_: str, argv: Sequence[str]) -> None:
        assert argv[1] == "-m"
        _run_module(argv[2], argv[3:])

    sys.argv = ["kdmesh", *arguments]
    with mock.patch.object(os, "execv", become):
        main()
