"""A teacher server as a real process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from kdmesh.handles.slab import named_memory
from tests.support.copies import Copy
from tests.support.teacher_server import teacher_config


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherProcess:
    """A server that has said that it is ready."""

    process: subprocess.Popen[str] | Copy
    grpc: str
    rest: str

    def get(self, path: str) -> Any:
        """The JSON that REST answers."""
        return httpx.get(f"http://{self.rest}{path}").json()

    def until_slots(self, state: str, count: int) -> None:
        """Return when so many slots are in that state; each look is a round trip."""
        while self.get("/v1/slab")["slots"][state] < count:
            pass

    def wait_event(self, event: str) -> dict[str, Any]:
        """Return when the process logs `event`."""
        return wait_event(self.process, event)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)


def wait_event(process: subprocess.Popen[str] | Copy, event: str) -> dict[str, Any]:
    """The line of the log that says `event`; fails when the process ends before."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("{") and (fields := json.loads(line))["event"] == event:
            assert isinstance(fields, dict)
            return fields
    raise AssertionError(f"the process ended without {event!r}: {''.join(seen)}")


def write_config(directory: Path, **sections: dict[str, Any]) -> Path:
    """A file of its own; sections are those of `teacher_config`."""
    path = directory / f"teacher-{len(list(directory.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(teacher_config(**sections).model_dump(mode="json")), encoding="utf-8")
    return path


@contextlib.contextmanager
def started(
    directory: Path, *command: str, environment: Mapping[str, str] = os.environ
) -> Iterator[subprocess.Popen[str]]:
    """A Python process, killed on exit if it still runs. Its temporary files lie in `directory`."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "TMPDIR": str(directory)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
        for noted in directory.rglob(named_memory.NOTE):  # which the next server would do, in the same directory
            while not named_memory.remove_noted(noted.parent):
                time.sleep(0.05)  # until the processes that have it mapped follow the one that was killed


def starting(
    directory: Path, *arguments: str, **sections: dict[str, Any]
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """A server that may not listen yet."""
    return started(directory, "-m", "kdmesh_teacher", str(write_config(directory, **sections)), *arguments)


@contextlib.contextmanager
def teacher_processes(directory: Path, *sections: dict[str, dict[str, Any]]) -> Iterator[list[TeacherProcess]]:
    """Servers that are ready, one for each configuration; killed on exit if they still run."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(starting(directory, **keys)) for keys in sections]
        yield [await_ready(process) for process in processes]


def await_ready(process: subprocess.Popen[str] | Copy) -> TeacherProcess:
    """The server, once it is ready."""
    ready = wait_event(process, "ready")
    return TeacherProcess(process=process, grpc=ready["grpc"], rest=ready["rest"])


@contextlib.contextmanager
def teacher_process(directory: Path, **sections: dict[str, Any]) -> Iterator[TeacherProcess]:
    """One server that is ready; killed on exit if it still runs."""
    with starting(directory, **sections) as process:
        yield await_ready(process)
