"""A teacher server as a real process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import yaml

from tests.support.teacher_server import teacher_config


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherProcess:
    """A server that has said that it is ready."""

    process: subprocess.Popen[str]
    grpc: str
    rest: str

    @property
    def stderr(self) -> IO[str]:
        """Its log."""
        assert self.process.stderr is not None
        return self.process.stderr

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


def wait_event(process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    """The line of the log that says `event`; fails when the process ends before."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("{") and (fields := json.loads(line))["event"] == event:
            assert isinstance(fields, dict)
            return fields
    raise AssertionError(f"the process ended without {event!r}: {''.join(seen)}")


def start(
    directory: Path, *arguments: str, env: dict[str, str] | None = None, **sections: dict[str, Any]
) -> subprocess.Popen[str]:
    """The process, which may not listen yet. Sections are those of `teacher_config`."""
    config = directory / f"teacher-{len(list(directory.iterdir()))}.yaml"
    config.write_text(yaml.safe_dump(teacher_config(**sections).model_dump(mode="json")), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "kdmesh_teacher", str(config), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(directory)} | (env or {}),
    )


@contextlib.contextmanager
def teacher_processes(directory: Path, *sections: dict[str, dict[str, Any]]) -> Iterator[list[TeacherProcess]]:
    """Servers that are ready, one for each configuration; killed on exit if they still run."""
    with contextlib.ExitStack() as stack:
        processes = [start(directory, **keys) for keys in sections]
        for process in processes:
            stack.callback(_end, process)
        ready = [wait_event(process, "ready") for process in processes]
        yield [
            TeacherProcess(process=process, grpc=fields["grpc"], rest=fields["rest"])
            for process, fields in zip(processes, ready, strict=True)
        ]


@contextlib.contextmanager
def teacher_process(directory: Path, **sections: dict[str, Any]) -> Iterator[TeacherProcess]:
    """One server that is ready; killed on exit if it still runs."""
    with teacher_processes(directory, sections) as (running,):
        yield running


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
