"""The RDMA door between real processes, which are killed, stopped and started again."""

from __future__ import annotations

import functools
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmesh.errors import ConfigError, Unavailable
from kdmesh.handles.doors.rdma import RdmaDoor
from kdmesh.handles.rdma.agent import UNSAFE_VARIABLE, Agent
from kdmesh.handles.rdma.buffers import Graveyard
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.teachers.session_options import SessionOptions
from tests.support.handles_consumer import ROOT
from tests.support.teacher_process import TeacherProcess, started, teacher_process, teacher_processes
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import running_teacher

pytestmark = pytest.mark.rdma

RDMA = {"rdma": True}
# Rows of 16 MiB, so that a read is not over when it has begun.
WIDE: dict[str, dict[str, Any]] = {
    "engine": {"hidden_size": 16384},
    "slab": {"slot_mib": 16, "lease_s": 3},
    "server": RDMA,
}
ASKED = [sequence(250)]


def expected() -> torch.Tensor:
    return expected_rows(ASKED, hidden_size=16384)


def when_a_read_begins(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, *teachers: TeacherProcess) -> None:
    """The next large read is under way when its teacher is killed, or stays stopped."""
    begin = Agent.begin_read

    def after_signal(agent: Agent, *args: Any, size_bytes: int, **rest: Any) -> Any:
        if size_bytes > 1000:
            monkeypatch.setattr(Agent, "begin_read", begin)
            teacher = next(teacher for teacher in teachers if teacher.get("/v1/slab")["slots"]["ready"])
            teacher.signal(signal.SIGSTOP)  # or the read may be over first
            os.waitpid(teacher.process.pid, os.WUNTRACED)
            transfer = begin(agent, *args, size_bytes=size_bytes, **rest)
            assert not transfer.is_done
            teacher.signal(number)
            return transfer
        return begin(agent, *args, size_bytes=size_bytes, **rest)

    monkeypatch.setattr(Agent, "begin_read", after_signal)


async def test_read_from_a_killed_server_fails_and_its_buffer_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buried = Graveyard()
    monkeypatch.setattr(RdmaDoor, "connect", functools.partial(RdmaDoor.connect, buried=buried))
    with teacher_process(tmp_path, **WIDE) as teacher:
        client = await TeacherClient.connect(teacher.grpc, SessionOptions(job="test", door="rdma"))
        when_a_read_begins(monkeypatch, signal.SIGKILL, teacher)
        with pytest.raises(Unavailable, match="RDMA"):
            await client.prefill(ASKED, Deadline.after(20))
        assert buried.size_bytes >= expected().nbytes
        assert isinstance(await client.wait_lost(), Unavailable)
        await client.close()


async def test_read_from_a_stopped_server_ends_with_its_own_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buried = Graveyard()
    monkeypatch.setattr(RdmaDoor, "connect", functools.partial(RdmaDoor.connect, read_s=0.3, buried=buried))
    with teacher_process(tmp_path, **WIDE) as teacher:
        client = await TeacherClient.connect(teacher.grpc, SessionOptions(job="test", door="rdma"))
        when_a_read_begins(monkeypatch, signal.SIGSTOP, teacher)
        with pytest.raises(Unavailable, match=r"did not end within 0\.5 s"):
            await client.prefill(ASKED, Deadline.after(20))
        assert buried.size_bytes >= expected().nbytes
        await client.close()


def test_pool_goes_to_another_server_when_one_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buried = Graveyard()
    monkeypatch.setattr(RdmaDoor, "connect", functools.partial(RdmaDoor.connect, read_s=0.3, buried=buried))
    with (
        teacher_processes(tmp_path, WIDE, WIDE) as (one, other),
        TeacherPool([one.grpc, other.grpc], job="test", door="rdma", deadline_s=60) as pool,
    ):
        assert torch.equal(pool.submit(ASKED).wait().rows_RD, expected())
        when_a_read_begins(monkeypatch, signal.SIGSTOP, one, other)
        for _ in range(3):
            assert torch.equal(pool.submit(ASKED).wait().rows_RD, expected())
        assert buried.size_bytes >= expected().nbytes


def test_server_that_restarts_at_the_same_address_is_read_again(tmp_path: Path) -> None:
    with teacher_process(tmp_path, **WIDE) as first:
        port = int(first.grpc.rpartition(":")[2])
        with TeacherPool([first.grpc], job="test", door="rdma", deadline_s=60) as pool:
            assert torch.equal(pool.submit(ASKED).wait().rows_RD, expected())
            first.signal(signal.SIGKILL)
            first.process.wait()
            again = {**WIDE, "server": RDMA | {"port": port}}
            with teacher_process(tmp_path, **again):
                assert torch.equal(pool.submit(ASKED).wait().rows_RD, expected())
                assert pool.stats().door == "rdma"


READER = """
import asyncio, sys
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.session_options import SessionOptions
from tests.support.teacher_requests import sequence

async def read_for_ever():
    client = await TeacherClient.connect(sys.argv[1], SessionOptions(job="reader", door="rdma"))
    while True:
        await client.prefill([sequence(250)], Deadline.after(60))
        print("read", flush=True)

asyncio.run(read_for_ever())
"""


def test_reader_that_is_killed_disturbs_no_other_and_keeps_no_slot(tmp_path: Path) -> None:
    with (
        teacher_process(tmp_path, **WIDE) as teacher,
        TeacherPool([teacher.grpc], job="test", door="rdma", deadline_s=60) as pool,
    ):
        with subprocess.Popen(
            [sys.executable, "-c", READER, teacher.grpc], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as reader:
            assert reader.stdout is not None
            for _ in range(3):
                assert reader.stdout.readline() == "read\n"
            reader.kill()
        for _ in range(3):
            assert torch.equal(pool.submit(ASKED).wait().rows_RD, expected())
        teacher.wait_event("session ended")
        teacher.until_slots("free", 4)


STUCK = """
import asyncio, os, signal, sys
from kdmesh.handles.rdma.agent import Agent
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.session_options import SessionOptions
from tests.support.teacher_requests import sequence

async def hang():
    client = await TeacherClient.connect(sys.argv[1], SessionOptions(job="reader", door="rdma"))
    begin = Agent.begin_read

    def stopped(*args, **rest):
        os.kill(int(sys.argv[2]), signal.SIGSTOP)
        return begin(*args, **rest)

    Agent.begin_read = stopped
    try:
        await asyncio.wait_for(client.prefill([sequence(250)], Deadline.after(60)), 0.5)
    except TimeoutError:
        print("hangs", flush=True)
        sys.exit(0)

asyncio.run(hang())
"""


def test_process_whose_read_hangs_can_end(tmp_path: Path) -> None:
    with teacher_process(tmp_path, **WIDE) as teacher:
        done = subprocess.run(
            [sys.executable, "-c", STUCK, teacher.grpc, str(teacher.process.pid)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (done.stdout, done.returncode) == ("hangs\n", 0), done.stderr


def test_server_refuses_to_start_over_other_transports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(UNSAFE_VARIABLE)
    config = tmp_path / "teacher.yaml"
    engine, server = "{kind: transformers, model: nowhere}", "{port: 0, rest_port: 0, rdma: true}"
    config.write_text(f"engine: {engine}\nserver: {server}\n", encoding="utf-8")
    with started(tmp_path, "-m", "kdmesh_teacher", str(config)) as process:  # refuses before it looks for the model
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "UCX_TLS is tcp; for RDMA it must name nothing but RDMA transports" in errors


async def test_client_refuses_other_transports_and_auto_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running_teacher(tmp_path, server=RDMA) as teacher:
        assert "RDMA OVER UNSAFE TRANSPORTS" in caplog.text
        (tmp_path / f"teacher-{teacher.addresses.grpc.rpartition(':')[2]}.sock").rename(tmp_path / "elsewhere")
        monkeypatch.delenv(UNSAFE_VARIABLE)
        with pytest.raises(ConfigError, match="UCX_TLS is tcp"):
            await TeacherClient.connect(teacher.addresses.grpc, SessionOptions(job="test", door="rdma"))
        async with teacher.client(door="auto") as client:
            assert client.door.name == "stream"
            assert torch.equal(
                (await client.prefill([sequence(9)], Deadline.after(10))).rows_RD, expected_rows([sequence(9)])
            )
            assert "UCX_TLS is tcp" in client.door_reason


async def test_client_of_a_server_without_rdma_is_told(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        with pytest.raises(ConfigError, match="the server has no RDMA"):
            await TeacherClient.connect(teacher.addresses.grpc, SessionOptions(job="test", door="rdma"))


def test_auto_goes_on_by_stream_when_rdma_breaks_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RdmaDoor, "connect", functools.partial(RdmaDoor.connect, buried=Graveyard()))
    run = tmp_path / "run"
    with teacher_process(tmp_path, server=RDMA | {"runtime_dir": str(run)}) as teacher:
        for path in run.iterdir():
            path.rename(tmp_path / "elsewhere")  # as on another node
        with TeacherPool([teacher.grpc], job="test", door="auto", deadline_s=60) as pool:
            asked = [sequence(30)]
            assert torch.equal(pool.submit(asked).wait().rows_RD, expected_rows(asked))
            assert list(pool.stats().doors) == ["rdma"]

            def broken(*args: Any, **rest: Any) -> None:
                raise Unavailable("RDMA: the adapter is gone")

            monkeypatch.setattr(Agent, "begin_read", broken)
            assert torch.equal(pool.submit(asked).wait().rows_RD, expected_rows(asked))
            (reason,) = [why for door, why in pool.stats().doors.items() if door == "stream"]
            assert "rdma: RDMA: the adapter is gone" in reason


LEAVING = """
import asyncio, sys
from kdmesh.handles.rdma.agent import Agent
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.session_options import SessionOptions

async def connect():
    return await TeacherClient.connect(sys.argv[1], SessionOptions(job="reader", door="rdma"))

leave = Agent.remove_peer

def told(agent, name):
    leave(agent, name)
    print("farewell", flush=True)

Agent.remove_peer = told
loop = asyncio.new_event_loop()
client = loop.run_until_complete(connect())
print("connected", flush=True)
"""


def test_process_that_ends_without_closing_says_farewell(tmp_path: Path) -> None:
    with teacher_process(tmp_path, server=RDMA) as teacher:
        done = subprocess.run(
            [sys.executable, "-c", LEAVING, teacher.grpc], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "connected\nfarewell\n", done.stderr
