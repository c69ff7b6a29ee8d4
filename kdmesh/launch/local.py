"""Runs the services of one machine as child processes that never outlive their parent."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from kdmesh.errors import KdmeshError
from kdmesh.exit_codes import TOLD
from kdmesh.launch.place import Place, exit_when_stopped
from kdmesh.log import is_urgent

_TETHER = Path(__file__).with_name("tether.py")
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL_LINES = 20
_GRACE_S = 120.0
_LONG_GRACE_S = 86400.0  # where somebody else kills what does not stop
_FAILING_TOGETHER_S = 5.0
_READY_LOOK_S = 0.05

"""Exit code of every kdmesh process that was refused its input."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class ChildFailed(KdmeshError):
    """A child process ended although it was still needed.

    Attributes:
        exit_code: what it exited with; -n when signal n killed it.
        is_told: it was refused its input, and a person has seen why.
    """

    def __init__(self, message: str, *, exit_code: int, is_told: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.is_told = is_told


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One child process to start."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # laid over this process's environment
    on_line: Callable[[str], None] | None = None  # shows each line of its output; None shares our stdout and stderr
    grace_s: float = _GRACE_S  # from SIGTERM to SIGKILL
    may_finish: bool = False  # whether it is no service, and is done when it exits with 0
    orphan_signal: signal.Signals = signal.SIGTERM  # what it gets when this process dies without stopping it


class Child:
    """A started command: the leader of its own session, so that a terminal's Ctrl-C reaches only its parent."""

    def __init__(self, command: Command, process: subprocess.Popen[str]) -> None:
        self.command = command
        self.exit_code: int | None = None
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.pidfd = os.pidfd_open(process.pid)
        self._process = process
        self._reader: threading.Thread | None = None
        if command.on_line is not None:
            self._reader = threading.Thread(target=self._forward, args=(command.on_line,), daemon=True)
            self._reader.start()

    @property
    def name(self) -> str:
        """The command's name."""
        return self.command.name

    def send(self, signum: signal.Signals) -> None:
        """Signal the process, if it still runs."""
        if self.exit_code is None:
            signal.pidfd_send_signal(self.pidfd, signum)

    def kill(self) -> None:
        """SIGKILL its whole session; the process is not reaped yet, so its id cannot have been reused."""
        if self.exit_code is None:
            with suppress(ProcessLookupError):  # from a signal handler, between the reaping and its record
                os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Wait for the process to end, end what it left in its session, and return its exit code."""
        if self.exit_code is None:
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
            self.kill()
            self.exit_code = self._process.wait()
            os.close(self.pidfd)
            if self._reader is not None:
                self._reader.join()
        return self.exit_code

    def _forward(self, on_line: Callable[[str], None]) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                self.tail.append(line.rstrip("\n"))
                on_line(self.tail[-1])


class Processes:
    """Children of this process, in groups: started in order, stopped in reverse.

    A context manager, for the main thread only (signals, and a child is tied to the thread that starts it).
    Inside it SIGINT, SIGTERM, and SIGHUP where it is not ignored, raise `Stopped`. On exit, for whatever reason, each
    group gets SIGTERM and its grace, then SIGKILL; a second signal kills everything at once.
    """

    def __init__(self) -> None:
        self._groups: list[list[Child]] = []
        self._received: list[int] = []
        self._is_shielded = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Processes:
        is_to_stay = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as nohup has it
        stopping = [signum for signum in _STOPPING if signum is not signal.SIGHUP or not is_to_stay]
        self._previous = {signum: signal.signal(signum, self._on_signal) for signum in stopping}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_shielded = True
        for group in reversed(self._groups):
            self.stop(group)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if self._received and not isinstance(error, Stopped):
            raise Stopped(self._received[0])

    def start(self, *commands: Command) -> list[Child]:
        """Start one group."""
        group: list[Child] = []
        self._groups.append(group)
        for command in commands:
            with self._shield():
                group.append(Child(command, _popen(command)))
        return group

    def serve(self, command: Command, *, ready_within_s: float) -> dict[str, Any]:
        """Start a service and wait for what it reports in its `--ready-file`: a JSON object, in place all at once.

        Raises:
            ChildFailed: it exited first, or another child failed meanwhile; or it was not ready in time, which is said
                with its last lines.
        """
        report = Path(tempfile.gettempdir()) / f"kdmesh-ready-{os.getpid()}-{uuid.uuid4().hex}"
        try:
            (child,) = self.start(replace(command, argv=(*command.argv, "--ready-file", str(report))))
            return self._await_report(child, report, ready_within_s)
        finally:
            report.unlink(missing_ok=True)

    def wait(self, children: Sequence[Child]) -> None:
        """Block until every one of `children` has exited with 0.

        Raises:
            ChildFailed: one of them exited with another code, or a service ended meanwhile.
            Stopped: a signal came.
        """
        waiting = [child for child in children if child.exit_code is None]
        while waiting:
            ended = _ended(self._live(), timeout_s=None)
            for child in ended:
                self._reap(child)
                if child not in waiting:
                    raise _failure(child)
            failed = [child for child in ended if child.exit_code != 0]
            if failed:
                # The others may be about to say why, or wait for ever for the one that is gone.
                self._see_out(waiting, within_s=_FAILING_TOGETHER_S)
                told = [child for child in waiting if child.exit_code in TOLD]
                raise _failure((told or failed)[0])
            waiting = [child for child in waiting if child.exit_code is None]

    def stop(self, group: Sequence[Child]) -> None:
        """SIGTERM to all of a group, SIGKILL to those that outlive their grace; they are gone on return."""
        with self._shield():
            for child in group:
                child.send(signal.SIGTERM)
            self._see_out(group, within_s=max((child.command.grace_s for child in group), default=0.0))

    def _live(self) -> list[Child]:
        return [child for group in self._groups for child in group if child.exit_code is None]

    def _await_report(self, child: Child, path: Path, within_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + within_s
        while not path.exists():
            for ended in _ended(self._live(), timeout_s=_READY_LOOK_S):
                self._reap(ended)
                if ended.exit_code != 0 or not ended.command.may_finish:
                    raise _failure(ended)
            if time.monotonic() > deadline:
                raise ChildFailed(f"{child.name} was not ready within {within_s:g} s{_last_lines(child)}", exit_code=0)
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return report

    def _see_out(self, children: Sequence[Child], *, within_s: float) -> None:
        """Return when all of them have ended; those that take longer are killed."""
        deadline = time.monotonic() + within_s
        while live := [child for child in children if child.exit_code is None]:
            ended = _ended(live, timeout_s=max(0.0, deadline - time.monotonic()))
            if not ended:
                for child in live:
                    child.kill()
            for child in ended or live:
                self._reap(child)

    def _reap(self, child: Child) -> None:
        with self._shield():
            child.reap()

    @contextmanager
    def _shield(self) -> Iterator[None]:
        """Hold back `Stopped` while a child is neither fully started nor fully ended."""
        if self._is_shielded:
            yield
            return
        self._is_shielded = True
        try:
            yield
        finally:
            self._is_shielded = False
        if self._received:
            raise Stopped(self._received[0])

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._received.append(signum)
        if len(self._received) > 1:
            for child in (child for group in self._groups for child in group):
                child.kill()
        elif not self._is_shielded:
            raise Stopped(signum)


def rank_commands(
    argv: Sequence[str],
    *,
    ranks: int,
    threads: int,
    on_line: Callable[[str], None] | None = None,
    place: Place | None = None,
) -> list[Command]:
    """The commands of one torch.distributed job on this machine, one per rank.

    With `place` the machine is one of several, each of which starts its own ranks.

    The environment is the one torchrun gives. torchrun itself is left out because it turns every exit code
    into 1 under a page of its own traceback, also after a clean stop. Ranks whose parent dies are killed at once:
    one that waited for the others, or for a teacher that is gone too, would stay for minutes.
    """
    meeting = _alone() if place is None else {"MASTER_ADDR": place.first_node, "MASTER_PORT": str(place.port)}
    first, nodes = (0, 1) if place is None else (place.node * ranks, place.nodes)
    return [
        Command(
            name=f"trainer rank {first + local_rank}",
            argv=tuple(argv),
            env={
                "RANK": str(first + local_rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(nodes * ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                **meeting,
                **thread_limits(threads),
                # A rank that finds the first one gone tells of it in a page of C++ frames, as a warning.
                "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            },
            on_line=on_line,
            grace_s=_GRACE_S if exit_when_stopped() is None else _LONG_GRACE_S,
            orphan_signal=signal.SIGKILL,
        )
        for local_rank in range(ranks)
    ]


def _alone() -> dict[str, str]:
    """Where the ranks meet when all of them are here; a host name that does not resolve must not matter then."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }


def thread_limits(threads: int) -> dict[str, str]:
    """Environment that gives a process this many CPU threads, unless the user has decided already."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def num_gpus() -> int:
    """NVIDIA GPUs this process may use, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))  # a container has only those it was given


def may_have_gpu() -> bool:
    """Whether torch may find one: there are also those that `num_gpus` does not count, of Windows' WSL or of AMD."""
    others = any(Path("/dev", name).exists() for name in ("dxg", "kfd"))
    return num_gpus() > 0 or ("CUDA_VISIBLE_DEVICES" not in os.environ and others)


def _popen(command: Command) -> subprocess.Popen[str]:
    tether = (sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), str(int(command.orphan_signal)))
    is_piped = command.on_line is not None
    return subprocess.Popen(
        (*tether, *command.argv),
        env={**os.environ, **command.env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if is_piped else None,
        stderr=subprocess.STDOUT if is_piped else None,
        start_new_session=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def _ended(children: Sequence[Child], *, timeout_s: float | None) -> list[Child]:
    ready = _ready([child.pidfd for child in children], timeout_s=timeout_s)
    return [child for child in children if child.pidfd in ready]


def _ready(descriptors: Sequence[int], *, timeout_s: float | None) -> set[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}


def _failure(child: Child) -> ChildFailed:
    code = child.exit_code
    assert code is not None
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return ChildFailed(f"{child.name} {how}", exit_code=code, is_told=code in TOLD)


def _last_lines(child: Child) -> str:
    """What a child said, without the events of its ordinary work where it said anything else."""
    lines = [line for line in child.tail if is_urgent(line)] or list(child.tail)
    return "".join(["; its last lines:", *(f"\n  {line}" for line in lines)]) if lines else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
