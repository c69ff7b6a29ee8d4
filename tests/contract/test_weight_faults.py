"""Real processes are killed in the middle of an update."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from kdmesh.errors import DeadlineExpired, InvalidRequest
from kdmesh.rpc.weights.delivery import Delivery
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.weights.buckets import BucketEntry
from kdmesh.weights.digests import digest
from kdmesh.weights.doors import DoorChoice
from kdmesh.weights.manifest import TensorSpec
from tests.support.weight_server import ROOT, served_by, weight_server_process
from tests.support.weight_targets import FINGERPRINT, makers_of, random_weights

SHAPES: dict[str, tuple[int, ...]] = {f"layer {i}": (100, 400) for i in range(12)}


@pytest.fixture(autouse=True)
def _private_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


def _weights(version: int) -> dict[TensorSpec, Tensor]:
    return random_weights(SHAPES, seed=version)


def _publish(sender: WeightSender, version: int) -> None:
    sender.publish(version, FINGERPRINT, makers_of(_weights(version)))


def _expected(version: int) -> tuple[int, str]:
    named = {spec.name: tensor for spec, tensor in _weights(version).items()}
    tensors = [named[name].reshape(-1).view(torch.uint8) for name in sorted(named)]
    return version, digest(torch.cat(tensors).numpy().data).hex()


def _shared_mappings(process: subprocess.Popen[bytes]) -> int:
    return Path(f"/proc/{process.pid}/maps").read_text().count("memfd:kdmesh")


def _unix_sockets(process: subprocess.Popen[bytes]) -> int:
    return len(psutil.Process(process.pid).net_connections(kind="unix"))


def _group_sockets(process: subprocess.Popen[bytes], address: str) -> int:
    """Open ones that have nothing to do with gRPC."""
    port = int(address.rpartition(":")[2])
    found = psutil.Process(process.pid).net_connections(kind="tcp")
    return sum(connection.laddr.port != port for connection in found)


def _start_sender(address: str, version: int, door: DoorChoice) -> subprocess.Popen[str]:
    arguments = [address, json.dumps(SHAPES), str(version), "0.1", door]
    command = [sys.executable, "-m", "tests.support.weight_sender_process", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("door", ["shm", "collective"])
def test_a_killed_sender_leaves_the_old_weights_and_nothing_else(door: DoorChoice, tmp_path: Path) -> None:
    with weight_server_process(tmp_path / "ready", list(_weights(0))) as (server, address):
        with WeightSender([address], door=door) as sender:
            _publish(sender, 1)
        before = _unix_sockets(server)
        with _start_sender(address, 2, door) as killed:
            assert killed.stdout is not None
            for _ in range(6):
                assert killed.stdout.readline().startswith("layer")
            if door == "shm":
                assert _shared_mappings(server) > 0 and _unix_sockets(server) > before
            else:
                assert _group_sockets(server, address) > 0
            killed.kill()
        assert served_by(address) == _expected(1)
        with WeightSender([address], deadline_s=20) as sender:
            _publish(sender, 3)
            assert served_by(address) == _expected(3)
        assert (_shared_mappings(server), _unix_sockets(server)) == (0, before)
        assert _group_sockets(server, address) == 0
    assert os.listdir(tempfile.gettempdir()) == []


class _Publishing(threading.Thread):
    """Publishes version 1; tells when the third tensor is made, which is in the middle."""

    def __init__(
        self, addresses: list[str], *, deadline_s: float, door: DoorChoice = "auto", bucket_s: float = 60
    ) -> None:
        super().__init__()
        self.is_halfway = threading.Event()
        self.error: Exception | None = None
        self._sender = WeightSender(addresses, bucket_bytes=2**16, deadline_s=deadline_s, door=door, bucket_s=bucket_s)
        self.start()

    def run(self) -> None:
        makers = makers_of(_weights(1))
        spec, make = makers[8]

        def tell() -> Tensor:
            self.is_halfway.set()
            return make()

        with self._sender as sender:
            try:
                sender.publish(1, FINGERPRINT, [*makers[:8], (spec, tell), *makers[9:]])
            except DeadlineExpired as error:
                self.error = error


@pytest.mark.parametrize("door", ["shm", "collective"])
def test_a_killed_server_is_reported_and_another_is_served(door: DoorChoice, tmp_path: Path) -> None:
    specs = list(_weights(0))
    with (
        weight_server_process(tmp_path / "one", specs, seconds_per_write=0.05) as (killed, gone),
        weight_server_process(tmp_path / "other", specs) as (_, address),
    ):
        publishing = _Publishing([gone, address], deadline_s=2, door=door)
        assert publishing.is_halfway.wait(20)
        killed.kill()
        publishing.join(20)
        assert str(publishing.error).startswith(f"version 1 was not taken within 2 s by {gone}: ")
        assert served_by(address) == _expected(1)


def test_a_server_that_hangs_is_reported_and_another_is_served(tmp_path: Path) -> None:
    specs = list(_weights(0))
    with (
        weight_server_process(tmp_path / "one", specs, seconds_per_write=0.05) as (stopped, hangs),
        weight_server_process(tmp_path / "other", specs) as (_, address),
    ):
        publishing = _Publishing([hangs, address], deadline_s=2, door="collective", bucket_s=0.5)
        assert publishing.is_halfway.wait(20)
        stopped.send_signal(signal.SIGSTOP)
        publishing.join(20)
        assert str(publishing.error).startswith(f"version 1 was not taken within 2 s by {hangs}: ")
        assert address not in str(publishing.error) and served_by(address) == _expected(1)
        stopped.send_signal(signal.SIGCONT)
        assert served_by(hangs)[0] == 0


def test_servers_take_the_same_bytes_through_different_doors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    specs = list(_weights(0))
    with (
        weight_server_process(tmp_path / "near", specs) as (_, near),
        weight_server_process(tmp_path / "far", specs, reach="groups") as (_, far),
        weight_server_process(tmp_path / "lost", specs, reach="nothing") as (_, lost),
        WeightSender([near, far, lost], bucket_bytes=2**16) as sender,
        caplog.at_level("INFO"),
    ):
        for version in (1, 2):
            _publish(sender, version)
            assert [served_by(address) for address in (near, far, lost)] == [_expected(version)] * 3
    doors = {(record.address, record.door) for record in caplog.records if record.msg == "weights on their way"}  # type: ignore[attr-defined]
    assert doors == {(near, "shm"), (far, "gloo"), (lost, "inline")}


def test_a_killed_server_that_is_back_in_time_gets_all_of_it(tmp_path: Path) -> None:
    specs = list(_weights(0))
    with weight_server_process(tmp_path / "one", specs, seconds_per_write=0.05) as (killed, address):
        publishing = _Publishing([address], deadline_s=60)
        assert publishing.is_halfway.wait(20)
        killed.kill()
        killed.wait()
        with weight_server_process(tmp_path / "one", specs, port=int(address.rpartition(":")[2])):
            publishing.join(60)
            assert publishing.error is None and served_by(address) == _expected(1)


def test_a_corrupted_byte_leaves_the_old_weights_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over = Delivery.hand_over

    async def corrupt(self: Delivery, buffer: int, entries: tuple[BucketEntry, ...]) -> None:
        self._memory.writable(buffer)[entries[-1].part.end_bytes - 1] ^= 1
        await hand_over(self, buffer, entries)

    running = weight_server_process(tmp_path / "ready", list(_weights(0)))
    with running as (server, address), WeightSender([address]) as sender:
        _publish(sender, 1)
        before = _unix_sockets(server)
        with monkeypatch.context() as patch, pytest.raises(InvalidRequest, match="not those sent"):
            patch.setattr(Delivery, "hand_over", corrupt)
            _publish(sender, 2)
        assert served_by(address) == _expected(1)
        assert (_shared_mappings(server), _unix_sockets(server)) == (0, before)
