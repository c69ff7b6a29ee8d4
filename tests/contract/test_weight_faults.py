"""Real processes are killed in the middle of an update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from torch import Tensor

from kdmesh.errors import DeadlineExpired, InvalidRequest
from kdmesh.rpc.weight_delivery import Delivery
from kdmesh.rpc.weight_sender import WeightSender
from kdmesh.v1 import rollout_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from kdmesh.weights.buckets import BucketEntry
from kdmesh.weights.digests import digest
from kdmesh.weights.manifest import TensorSpec
from kdmesh.weights.packing import Weights
from tests.support.weight_server import ROOT, weight_server_process
from tests.support.weight_targets import FINGERPRINT, random_weights

SHAPES: dict[str, tuple[int, ...]] = {f"layer {i}": (100, 400) for i in range(12)}


@pytest.fixture(autouse=True)
def _private_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


def _weights(version: int) -> dict[TensorSpec, Tensor]:
    return random_weights(SHAPES, seed=version)


def _makers(weights: Mapping[TensorSpec, Tensor]) -> Weights:
    return [(spec, lambda tensor=tensor: tensor) for spec, tensor in weights.items()]  # type: ignore[misc]


def _publish(sender: WeightSender, version: int) -> None:
    sender.publish(version, FINGERPRINT, _makers(_weights(version)))


def _served(address: str) -> tuple[int, str]:
    """Version, and digest of the bytes."""
    with grpc.insecure_channel(address) as channel:
        described = RolloutStub(channel).Describe(pb.DescribeRolloutRequest(), timeout=20)
    return described.weight_version, described.model_name


def _expected(version: int) -> tuple[int, str]:
    named = {spec.name: tensor for spec, tensor in _weights(version).items()}
    tensors = [named[name].reshape(-1).view(torch.uint8) for name in sorted(named)]
    return version, digest(torch.cat(tensors).numpy().data).hex()


def _shared_mappings(process: subprocess.Popen[bytes]) -> int:
    return Path(f"/proc/{process.pid}/maps").read_text().count("memfd:kdmesh")


def _unix_sockets(process: subprocess.Popen[bytes]) -> int:
    return len(psutil.Process(process.pid).net_connections(kind="unix"))


def _start_sender(address: str, version: int) -> subprocess.Popen[str]:
    arguments = [address, json.dumps(SHAPES), str(version), "0.1"]
    command = [sys.executable, "-m", "tests.support.weight_sender_process", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_sender_leaves_the_old_weights_and_nothing_else(tmp_path: Path) -> None:
    with weight_server_process(tmp_path / "ready", list(_weights(0))) as (server, address):
        with WeightSender([address]) as sender:
            _publish(sender, 1)
        before = _unix_sockets(server)
        with _start_sender(address, 2) as killed:
            assert killed.stdout is not None
            for _ in range(6):
                assert killed.stdout.readline().startswith("layer")
            assert _shared_mappings(server) > 0 and _unix_sockets(server) > before
            killed.kill()
        assert _served(address) == _expected(1)
        with WeightSender([address], deadline_s=20) as sender:
            _publish(sender, 3)
            assert _served(address) == _expected(3)
        assert _shared_mappings(server) == 0
        assert _unix_sockets(server) == before
    assert os.listdir(tempfile.gettempdir()) == []


class _Publishing(threading.Thread):
    """Publishes version 1; tells when the third tensor is made, which is in the middle."""

    def __init__(self, addresses: list[str], *, deadline_s: float) -> None:
        super().__init__()
        self.is_halfway = threading.Event()
        self.error: Exception | None = None
        self._sender = WeightSender(addresses, bucket_bytes=2**16, deadline_s=deadline_s)
        self.start()

    def run(self) -> None:
        makers = _makers(_weights(1))
        spec, make = makers[8]

        def tell() -> Tensor:
            self.is_halfway.set()
            return make()

        with self._sender as sender:
            try:
                sender.publish(1, FINGERPRINT, [*makers[:8], (spec, tell), *makers[9:]])
            except DeadlineExpired as error:
                self.error = error


def test_a_killed_server_is_reported_and_another_is_served(tmp_path: Path) -> None:
    specs = list(_weights(0))
    with (
        weight_server_process(tmp_path / "one", specs, seconds_per_write=0.05) as (killed, gone),
        weight_server_process(tmp_path / "other", specs) as (_, address),
    ):
        publishing = _Publishing([gone, address], deadline_s=3)
        assert publishing.is_halfway.wait(20)
        killed.kill()
        publishing.join(20)
        assert str(publishing.error).startswith(f"version 1 was not taken within 3 s by {gone}: ")
        assert _served(address) == _expected(1)


def test_a_killed_server_that_is_back_in_time_gets_all_of_it(tmp_path: Path) -> None:
    specs = list(_weights(0))
    with weight_server_process(tmp_path / "one", specs, seconds_per_write=0.05) as (killed, address):
        publishing = _Publishing([address], deadline_s=60)
        assert publishing.is_halfway.wait(20)
        killed.kill()
        killed.wait()
        with weight_server_process(tmp_path / "one", specs, port=int(address.rpartition(":")[2])):
            publishing.join(60)
            assert publishing.error is None and _served(address) == _expected(1)


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
        assert _served(address) == _expected(1)
        assert (_shared_mappings(server), _unix_sockets(server)) == (0, before)
