"""Processes that report as schedulers get the memory to write, and are missed when they die."""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kdmesh.errors import EngineFailure
from kdmesh.handles.slab.memory import create_segment, map_readonly
from kdmesh.sglang import shared_files
from kdmesh.sglang.schedulers import Schedulers

SIZE = 1 << 16

# Reports as a scheduler does, then writes one row for each line it is told.
_SCHEDULER = """
import json, socket, sys
import numpy as np, torch
from kdmesh.sglang.messages import Hello, pack
from kdmesh.sglang.segments import Segments
from kdmesh.types import DType
from kdmesh_teacher.sglang.ask import Ask
from kdmesh_teacher.sglang.rows import RowProgress
path, hello = sys.argv[1], json.loads(sys.argv[2])
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(path)
sock.send(pack(Hello(**hello)))
segments = Segments()
segments.follow(sock)
for line in sys.stdin:
    number, value = json.loads(line)
    ask = Ask(segment=number, offset_bytes=8, dtype=DType.FLOAT32, first_computed=0, positions=np.zeros(1, np.int32))
    progress = RowProgress(ask, segments, position=0)
    progress.take(torch.full((2, 4), value))
    print(progress.num_written, flush=True)
"""


class Process:
    """One such process."""

    def __init__(self, socket_path: Path, hello: dict[str, object]) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", _SCHEDULER, str(socket_path), json.dumps(hello)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def write(self, number: int, value: float) -> int:
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.popen.stdin.write(f"[{number}, {value}]\n")
        self.popen.stdin.flush()
        return int(self.popen.stdout.readline())


def hello(*, writes: bool = True, unhooked: Sequence[str] = ()) -> dict[str, object]:
    return {"rank": "tensor 0", "writes": writes, "unhooked": list(unhooked)}


@contextlib.contextmanager
def reported(directory: Path, *hellos: dict[str, object]) -> Iterator[tuple[Schedulers, list[Process]]]:
    schedulers = Schedulers(directory / "s.sock")
    processes = [Process(schedulers.socket_path, each) for each in hellos]
    try:
        schedulers.wait_reports(len(hellos), 30)
        yield schedulers, processes
    finally:
        schedulers.close()
        for process in processes:
            process.popen.kill()
            process.popen.communicate()


def test_all_that_write_map_a_segment_while_it_is_made(tmp_path: Path) -> None:
    with reported(tmp_path, hello(), hello(), hello(writes=False)) as (schedulers, (one, two, other)):
        schedulers.watch(lambda reason: None)
        with contextlib.closing(create_segment(SIZE, schedulers)) as segment:
            reader = memoryview(map_readonly(segment.fd, SIZE)).cast("f")
            assert one.write(segment.number, 7.0) == 1
            assert reader[1:7].tolist() == [0, 7, 7, 7, 7, 0]
            assert two.write(segment.number, 8.0) == 1
            assert reader[1:7].tolist() == [0, 8, 8, 8, 8, 0]
            assert other.write(segment.number, 9.0) == 0
            schedulers.drop(segment)
            with contextlib.closing(create_segment(SIZE, schedulers)) as later:  # messages keep their order
                assert one.write(segment.number, 1.0) == 0
                assert one.write(later.number, 1.0) == 1


def test_all_map_the_segment_of_new_weights(tmp_path: Path) -> None:
    with reported(tmp_path, hello(), hello(writes=False)) as (schedulers, processes):
        schedulers.watch(lambda reason: None)
        with contextlib.closing(create_segment(SIZE, schedulers.readers_of_weights)) as segment:
            assert [process.write(segment.number, 7.0) for process in processes] == [1, 1]
            schedulers.readers_of_weights.drop(segment)
            with contextlib.closing(create_segment(SIZE, schedulers)):
                assert [process.write(segment.number, 7.0) for process in processes] == [0, 0]


def test_a_death_is_told_at_once_and_ends_what_waits(tmp_path: Path) -> None:
    with reported(tmp_path, hello(), hello(writes=False)) as (schedulers, (one, two)):
        deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
        schedulers.watch(deaths.put)
        one.popen.send_signal(signal.SIGSTOP)  # it does not map what it is shown
        failures = list[OSError]()

        def make() -> None:
            try:
                create_segment(SIZE, schedulers)
            except OSError as error:
                failures.append(error)

        making = threading.Thread(target=make)
        making.start()
        two.popen.kill()
        reason = deaths.get(timeout=60)
        assert str(two.popen.pid) in reason
        making.join(60)
        assert str(failures[0]) == reason


def test_the_death_of_a_process_that_hands_requests_out_is_told_too(tmp_path: Path) -> None:
    with (
        reported(tmp_path, hello()) as (schedulers, _),
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other,
    ):
        deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
        schedulers.watch(deaths.put, [other.pid])
        other.kill()
        assert deaths.get(timeout=60) == f"SGLang's process {other.pid} died"


def test_a_death_before_it_is_watched_for_is_told(tmp_path: Path) -> None:
    with (
        reported(tmp_path, hello()) as (schedulers, _),
        subprocess.Popen([sys.executable, "-c", ""]) as other,
    ):
        other.wait()
        deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
        schedulers.watch(deaths.put, [other.pid])
        assert deaths.get(timeout=60) == f"SGLang's process {other.pid} died"


@pytest.mark.parametrize("has_died", [True, False], ids=["died", "hangs"])
def test_one_that_comes_and_says_nothing_has_not_reported(tmp_path: Path, has_died: bool) -> None:
    with contextlib.closing(Schedulers(tmp_path / "s.sock")) as schedulers:
        silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.closing(silent):
            silent.connect(str(schedulers.socket_path))
            if has_died:
                silent.close()
            with pytest.raises(EngineFailure, match="0 of 1 SGLang schedulers"):
                schedulers.wait_reports(1, 0.2)


def test_fewer_reports_than_schedulers_are_refused(tmp_path: Path) -> None:
    with reported(tmp_path, hello()) as (schedulers, _), pytest.raises(EngineFailure, match="1 of 2 SGLang schedulers"):
        schedulers.wait_reports(2, 0.2)


def test_a_scheduler_without_a_hook_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineFailure, match=r"could not hook a\.b"),
        reported(tmp_path, hello(), hello(unhooked=["a.b"])),
    ):
        pass


_MAPS = """
import mmap, sys
files = [open(path, "r+b") for path in sys.argv[1:]]
mappings = [mmap.mmap(file.fileno(), 0) for file in files]
print(len(mappings), flush=True)
sys.stdin.read()
"""


def test_named_memory_that_a_killed_process_made_is_removed_and_nothing_else() -> None:
    files = [Path("/dev/shm", f"{prefix}{secrets.token_hex(8)}") for prefix in ("sgl_shm_mq_", "sem.mp-", "cuda.shm.")]
    unmapped = Path("/dev/shm", f"sgl_shm_mq_{secrets.token_hex(8)}")
    try:
        for file in (*files, unmapped):
            file.write_bytes(b"12345678")
        arguments = [sys.executable, "-c", _MAPS, *map(str, files)]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"3\n"
            files[1] = files[1].rename(f"{files[1]}x")  # as a semaphore gets its name
            found = shared_files.mapped_by([process.pid])
            process.kill()
        assert found == set(files[:2])
        assert not shared_files.mapped_by([process.pid])
        shared_files.remove(found)
        shared_files.remove(found)
        assert [file.exists() for file in (*files, unmapped)] == [False, False, True, True]
    finally:
        for file in (*files, unmapped):
            file.unlink(missing_ok=True)
