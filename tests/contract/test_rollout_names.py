"""Rollout servers that come and go behind a service: each has the weights before it samples."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kdmesh.errors import DeadlineExpired
from kdmesh.rpc.rollouts.pending_samples import PendingSamples
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.types import Sampling
from tests.contract.test_rollout_weights import FINGERPRINT, weights
from tests.support.cluster_services import announce, own_cluster, withdraw
from tests.support.fake_cluster import FakeCluster
from tests.support.rollout_samples import expected_tokens, prompt
from tests.support.rollout_server import rollout_process
from tests.support.teacher_process import TeacherProcess

SERVICE = "k8s:///rollouts.ml:grpc"
SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[FakeCluster]:
    with own_cluster(tmp_path) as running:
        yield running


class Deployment:
    """Servers behind the service, and a job that samples from them and brings them its weights."""

    def __init__(self, directory: Path, cluster: FakeCluster, stack: ExitStack) -> None:
        """With one server, which has version 1."""
        self._directory = directory
        self._cluster = cluster
        self._stack = stack
        self.first = self.start()
        self.pool = stack.enter_context(RolloutPool([SERVICE], job="test", deadline_s=150))
        self.sender = stack.enter_context(WeightSender(self.pool.addresses, bucket_bytes=2**20, deadline_s=150))
        self.new, self._salt = weights(1)
        assert self.publish(1) == frozenset()

    def start(self, **engine: int) -> TeacherProcess:
        """One more, which is ready when this returns."""
        engine = {"seconds_per_step": 0.01, "vocabulary_size": 60, **engine}
        server = self._stack.enter_context(rollout_process(self._directory, engine=engine))
        announce(self._cluster, "rollouts", server.grpc)
        return server

    def end(self, server: TeacherProcess, number: signal.Signals = signal.SIGTERM) -> None:
        """As the cluster ends a pod."""
        withdraw(self._cluster, "rollouts", server.grpc)
        server.signal(number)
        server.process.wait(150)

    def publish(self, version: int) -> frozenset[str]:
        """To all; who was left behind."""
        behind = self.sender.publish(version, FINGERPRINT, self.new, needed=1)
        self.pool.note_weights(version, behind=behind)
        return behind

    def catch_up(self, version: int) -> frozenset[str]:
        """Whoever lacks the version, as the trainer does in the middle of a step."""
        outdated = self.sender.outdated(version, among=self.pool.outdated())
        assert self.sender.publish(version, FINGERPRINT, self.new, to=outdated, needed=0) == frozenset()
        self.pool.note_weights(version, behind=())
        return outdated

    def ask(self, seed: int, *, newest: int) -> PendingSamples:
        """One sample."""
        return self.pool.submit(prompt(), SAMPLING, num_samples=1, seed=seed, min_weight_version=newest)

    def expected(self, seed: int) -> list[int]:
        """Its tokens."""
        return expected_tokens(prompt(), seed, 6, salt=self._salt)


@pytest.fixture
def deployment(cluster: FakeCluster, tmp_path: Path) -> Iterator[Deployment]:
    with ExitStack() as stack:
        yield Deployment(tmp_path, cluster, stack)


def test_a_server_in_the_place_of_a_lost_one_gets_the_weights_before_it_samples(deployment: Deployment) -> None:
    deployment.first.signal(signal.SIGSTOP)
    pending = [deployment.ask(seed, newest=1) for seed in range(3)]
    deployment.end(deployment.first, signal.SIGKILL)
    second = deployment.start()
    assert not deployment.pool.wait(pending)
    assert deployment.pool.outdated() == {second.grpc}
    assert deployment.catch_up(1) == {second.grpc}
    assert deployment.pool.wait(pending)
    for seed, one in enumerate(pending):
        (sample,) = one.wait()
        assert (sample.token_ids.tolist(), sample.min_weight_version) == (deployment.expected(seed), 1)
    assert deployment.pool.outdated() == frozenset()


def test_a_server_that_the_sender_has_not_found_yet_is_brought_the_weights_all_the_same(
    deployment: Deployment, tmp_path: Path
) -> None:
    with rollout_process(tmp_path) as elsewhere:  # which another rank has found
        assert deployment.sender.outdated(1) == frozenset()
        assert deployment.sender.outdated(1, among={elsewhere.grpc}) == {elsewhere.grpc}
        new = deployment.new
        assert deployment.sender.publish(1, FINGERPRINT, new, to={elsewhere.grpc}, needed=0) == frozenset()
        assert elsewhere.get("/v1/model")["weight_version"] == 1


def test_new_weights_wait_for_a_server_while_there_is_none(deployment: Deployment) -> None:
    deployment.end(deployment.first)
    behind: list[frozenset[str]] = []
    publishing = threading.Thread(target=lambda: behind.append(deployment.publish(2)))
    publishing.start()
    second = deployment.start()
    publishing.join(150)
    assert behind == [frozenset()]
    (sample,) = deployment.ask(7, newest=2).wait()
    assert (sample.token_ids.tolist(), sample.min_weight_version) == (deployment.expected(7), 2)
    assert second.get("/v1/model")["weight_version"] == 2


def test_new_weights_that_nobody_comes_to_take_are_told_of() -> None:
    with WeightSender(lambda: (), bucket_bytes=2**20, deadline_s=0.5) as sender:
        with pytest.raises(DeadlineExpired, match=r"version 2 was not taken within 0\.5 s by any server"):
            sender.publish(2, FINGERPRINT, weights(2)[0], needed=1)
        with pytest.raises(DeadlineExpired, match="all servers have gone, and none came"):
            sender.describe()


@pytest.mark.parametrize("engine", [{"vocabulary_size": 61}, {"max_sequence_tokens": 32}])
def test_a_server_of_another_model_or_a_narrower_one_that_joins_is_left_alone(
    deployment: Deployment, engine: dict[str, int]
) -> None:
    other = deployment.start(**engine)
    third = deployment.start()
    while third.grpc not in deployment.pool.outdated():
        pass
    while deployment.pool._fleet._replicas.addresses != {deployment.first.grpc, other.grpc, third.grpc}:
        pass
    assert deployment.publish(2) == frozenset()
    assert other.get("/v1/model")["weight_version"] == 0
    assert other.grpc not in deployment.pool.outdated()
    assert [server.get("/v1/model")["weight_version"] for server in (deployment.first, third)] == [2, 2]
