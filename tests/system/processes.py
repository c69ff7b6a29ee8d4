"""Services and jobs as real processes, with their output in files and their ends noticed at once."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]

_LOOK_S = 0.02
_PATIENCE_S = 120.0  # of a test that waits; far beyond what a busy machine needs


class Process:
    """A process that writes stdout and stderr to one file."""

    def __init__(self, name: str, directory: Path, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start it in `directory`."""
        self.name = name
        self.log = directory / f"{name}-{len(list(directory.glob(f'{name}-*.log'))) + 1}.log"
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=directory,
                # The gate is a module of the tests. One thread: the same sums in the same order.
                # A process that crashes says what its threads were doing.
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONFAULTHANDLER": "1",
                    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                    "TMPDIR": str(directory),
                    **env,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def exit_code(self, within_s: float = _PATIENCE_S) -> int:
        """What it ended with; -n when signal n killed it. Fails when it does not end in time."""
        assert self.has_ended(within_s), f"{self.name} still runs after {within_s} s; {self._said()}"
        return self._process.wait()

    def succeed(self) -> None:
        """Return when it has ended well; fails when it does not."""
        code = self.exit_code()
        assert code == 0, f"{self.name} ended with {code}; {self._said()}"

    def has_ended(self, within_s: float = 0.0) -> bool:
        """Whether it ends within this time."""
        return bool(select.select([self._pidfd], [], [], within_s)[0])

    def until(self, is_so: Callable[[], object], *, within_s: float = _PATIENCE_S) -> None:
        """Return when `is_so`; fails when the process ends before, or when it takes too long."""
        deadline_s = time.monotonic() + within_s
        while not is_so():
            assert not self.has_ended(_LOOK_S), f"{self.name} has ended too early; {self._said()}"
            assert time.monotonic() < deadline_s, f"{self.name}: it was not so within {within_s} s; {self._said()}"

    def events(self, event: str) -> list[dict[str, Any]]:
        """The lines of its log that say `event`."""
        found = [json.loads(line) for line in self._lines() if line.startswith("{")]
        return [line for line in found if line["event"] == event]

    def words(self) -> list[str]:
        """What it said that is no event: for a person."""
        return [line for line in self._lines() if not line.startswith("{")]

    def close(self) -> None:
        """End it if it still runs."""
        self._process.kill()
        self._process.wait()
        os.close(self._pidfd)

    def _lines(self) -> list[str]:
        """Finished lines only: it may be writing."""
        return self.log.read_text(encoding="utf-8").split("\n")[:-1]

    def _said(self) -> str:
        return "it said:\n" + "\n".join(self._lines()[-20:])


class Processes:
    """Processes that do not outlive their `with`."""

    def __init__(self) -> None:
        self._started: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._started):
            process.close()

    def start(self, name: str, directory: Path, *command: str, **env: str) -> Process:
        """Start one; its temporary files and its output lie in `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        process = Process(name, directory, command, env)
        self._started.append(process)
        return process
