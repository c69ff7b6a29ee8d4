"""What every benchmark shares: child servers, medians, a table with a JSON line at its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_START_S = 120.0


def say(line: str = "") -> None:
    """One line on standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def finish(name: str, figures: Mapping[str, object]) -> None:
    """The benchmark's last line: one JSON object."""
    say(json.dumps({"benchmark": name, **figures}))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        say("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One that is ready."""

    pid: int
    grpc: str  # host:port
    rest: str  # empty: it has none


@contextlib.contextmanager
def server(command: Sequence[str], ready_file: Path, *, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """The gRPC address of a server that `command` starts; it writes `ready_file` when it is ready."""
    with started(command, ready_file, env=env) as running:
        yield running.grpc


@contextlib.contextmanager
def started(command: Sequence[str], ready_file: Path, *, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that `command` starts; it writes `ready_file` when it is ready."""
    process = subprocess.Popen(command, env={**os.environ, **(env or {})})
    try:
        ends_s = time.monotonic() + _START_S
        while not ready_file.exists():
            if process.poll() is not None or time.monotonic() > ends_s:
                raise SystemExit(f"{' '.join(command)} did not start")
            time.sleep(0.05)
        told = json.loads(ready_file.read_text(encoding="utf-8"))
        yield Server(pid=process.pid, grpc=told["grpc"], rest=told.get("rest", ""))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
