"""A teacher on one host and a trainer's side on another: latency and loss slow rows down, and make none wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdmesh.auth.config import ClientTlsConfig
from kdmesh.handles.rdma.agent import UNSAFE_VALUE, UNSAFE_VARIABLE
from tests.support import two_hosts
from tests.support.certificates import CertificateAuthority
from tests.support.far_client import ACCESS_VARIABLE
from tests.support.identities import JOB, access_with, write_tokens
from tests.support.teacher_process import TeacherProcess, await_ready, write_config
from tests.support.two_hosts import Host, Wire

_OBSTACLE = two_hosts.obstacle()
pytestmark = [pytest.mark.network, pytest.mark.skipif(bool(_OBSTACLE), reason=_OBSTACLE)]

HIDDEN_SIZE = 1024
SLAB = {"slots": 4, "slot_mib": 8, "lease_s": 2.0}


_WATCH_HEALTH = """
import sys
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from kdmesh.rpc.channel import open_channel
import asyncio

async def watch():
    async for state in HealthStub(open_channel(sys.argv[1])).Watch(HealthCheckRequest()):
        print(state, end="", flush=True)

asyncio.run(watch())
"""


class FarClient:
    """See tests/support/far_client.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.doors: dict[str, str] = self.hear()["doors"]
        self._seed = 0

    def ask(self, num_rows: int = 50) -> None:
        self._seed += 1
        assert self.process.stdin is not None
        self.process.stdin.write(f"{num_rows} {self._seed}\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the far client has ended"
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def gets_rows(self, num_rows: int = 50) -> float:
        """How long that took."""
        self.ask(num_rows)
        answer = self.hear()
        assert answer.get("is_right") is True, answer
        return float(answer["seconds"])


@dataclass(frozen=True)
class World:
    """What a test has."""

    near: Host
    far: Host
    wire: Wire
    directory: Path
    stack: ExitStack

    def teacher(self, host: Host, **server: object) -> TeacherProcess:
        """On that host."""
        sections = {
            "server": {"host": host.address, "allow_anonymous": True, "runtime_dir": str(self.runtime_dir), **server},
            "engine": {"hidden_size": HIDDEN_SIZE, "max_batch_tokens": 2048},
            "slab": SLAB,
        }
        config = write_config(self.directory, **sections)
        return await_ready(self._start(host.command(sys.executable, "-m", "kdmesh_teacher", str(config))))

    def client(self, *addresses: str, door: str = "auto", wire: str = "exact", deadline_s: float = 60) -> FarClient:
        """On the far host, which does not share the directory of the teachers' sockets."""
        arguments = [door, wire, str(deadline_s), str(HIDDEN_SIZE), *addresses]
        command = self.far.command(
            sys.executable, "-m", "tests.support.far_client", *arguments, hidden=self.runtime_dir
        )
        return FarClient(self._start(command))

    @property
    def runtime_dir(self) -> Path:
        return self.directory / "run"

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

        def end() -> None:
            process.kill()
            process.communicate()

        self.stack.callback(end)
        return process


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "run").mkdir(mode=0o700)
    with two_hosts.two_hosts() as (near, far, wire), ExitStack() as stack:
        yield World(near, far, wire, tmp_path, stack)


def test_auto_takes_the_stream_to_another_host_and_says_why(world: World) -> None:
    client = world.client(world.teacher(world.near).grpc)
    (door,) = client.doors
    assert door == "stream" and client.doors[door].startswith("shm: no shared memory through ")
    for num_rows in (1, 50, 2000):
        client.gets_rows(num_rows)


def test_the_same_host_is_known_by_its_memory_and_not_by_its_address(world: World) -> None:
    teacher = world.teacher(world.near)
    arguments = ["auto", "exact", "60", str(HIDDEN_SIZE), teacher.grpc]
    command = world.near.command(sys.executable, "-m", "tests.support.far_client", *arguments)
    client = FarClient(world._start(command))
    assert list(client.doors) == ["shm"]
    client.gets_rows()


@pytest.mark.parametrize("door", ["stream", "collective"])
def test_latency_and_loss_only_slow_rows_down(world: World, door: str) -> None:
    client = world.client(world.teacher(world.near, groups=True).grpc, door=door)
    quick_s = min(client.gets_rows(500) for _ in range(3))
    world.wire.delay_s = 0.05
    assert min(client.gets_rows(500) for _ in range(3)) >= quick_s + 0.1  # at least one round trip more
    world.wire.delay_s, world.wire.loss = 0.005, 0.02
    for _ in range(5):
        client.gets_rows(500)
    assert world.wire.num_lost > 0


@pytest.mark.parametrize("door", ["stream", "collective"])
def test_a_partition_is_waited_for_and_no_longer_and_what_heals_goes_on(world: World, door: str) -> None:
    client = world.client(world.teacher(world.near, groups=True).grpc, door=door, deadline_s=8)
    client.gets_rows()
    world.wire.is_cut = True
    client.ask()
    answer = client.hear()
    assert answer["error"].startswith("DeadlineExpired: ") and 7 < answer["seconds"] < 30
    client.ask()
    world.wire.is_cut = False
    assert client.hear().get("is_right") is True
    client.gets_rows(2000)


def test_both_ends_let_go_of_a_connection_whose_other_host_is_gone_without_a_word(world: World) -> None:
    """Also where it would have had nothing to say."""
    watching = [sys.executable, "-c", _WATCH_HEALTH, world.teacher(world.near).grpc]
    heard = world._start(world.far.command(*watching)).stdout
    assert heard is not None and heard.readline() == "status: SERVING\n"
    time.sleep(1)  # until nothing is left to be acknowledged, which the kernel would miss
    world.wire.is_cut = True
    began_s = time.monotonic()
    while _connections(world.near, world.far) or _connections(world.far, world.near):
        assert time.monotonic() - began_s < 60
        time.sleep(0.2)


def _connections(host: Host, other: Host) -> list[str]:
    """A line for each that the host has with the other."""
    command = host.command("ss", "-H", "-t", "-n", "state", "established", "dst", other.address)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_short_partition_in_the_middle_of_a_matrix_costs_time_only(world: World) -> None:
    client = world.client(world.teacher(world.near).grpc)
    client.gets_rows()
    world.wire.delay_s = 0.01
    before = world.wire.num_packets
    client.ask(2000)  # 8 MiB
    while world.wire.num_packets < before + 200:
        pass
    world.wire.is_cut = True
    lost = world.wire.num_lost
    while world.wire.num_lost < lost + 3:
        pass
    world.wire.is_cut = False
    assert client.hear().get("is_right") is True


def test_fp8_puts_a_quarter_of_the_bytes_of_float32_rows_on_the_wire(world: World) -> None:
    teacher = world.teacher(world.near)
    sent = {}
    for wire in ("exact", "fp8"):
        client = world.client(teacher.grpc, wire=wire)
        before = world.wire.num_bytes
        client.gets_rows(2000)
        sent[wire] = world.wire.num_bytes - before
    assert list(client.doors) == ["stream_fp8"]
    assert 0.25 <= sent["fp8"] / sent["exact"] < 0.3


def test_work_moves_to_a_teacher_that_can_be_reached(world: World) -> None:
    """One teacher behind the wire, one on the client's own host."""
    far_teacher, near_teacher = world.teacher(world.near), world.teacher(world.far)
    client = world.client(far_teacher.grpc, near_teacher.grpc)
    client.gets_rows()
    world.wire.is_cut = True
    for _ in range(6):
        client.gets_rows()
    world.wire.is_cut = False
    client.gets_rows()


@pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="make test-rdma installs NIXL")
def test_rdma_door_leads_to_another_host_and_outlasts_a_partition(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NIXL's TCP transport, with identities and TLS on the gRPC side, as the door demands."""
    monkeypatch.setenv(UNSAFE_VARIABLE, UNSAFE_VALUE)
    monkeypatch.setenv("UCX_TLS", "tcp")
    authority = CertificateAuthority(tmp_path)
    pair = authority.issue("teacher", ["teacher"])
    tokens = write_tokens(tmp_path / "tokens.yaml", JOB)
    access = access_with(JOB, tmp_path).model_copy(
        update={"tls": ClientTlsConfig(ca=authority.cert, server_name="teacher")}
    )
    monkeypatch.setenv(ACCESS_VARIABLE, access.model_dump_json())
    teacher = world.teacher(
        world.near,
        allow_anonymous=False,
        rdma=True,
        tls={"cert": str(pair.cert), "key": str(pair.key)},
        auth={"tokens": str(tokens)},
    )
    client = world.client(teacher.grpc, door="rdma", deadline_s=8)
    assert list(client.doors) == ["rdma"]
    for num_rows in (1, 50, 2000):
        client.gets_rows(num_rows)
    world.wire.is_cut = True
    client.ask()
    assert client.hear()["error"].startswith("DeadlineExpired: ")
    client.ask()
    world.wire.is_cut = False
    assert client.hear().get("is_right") is True
    client.gets_rows(2000)
