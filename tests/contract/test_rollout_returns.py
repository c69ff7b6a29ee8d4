"""A rollout server that was killed comes back with the weights that it was started with."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kdmesh.rpc.rollouts.pending_samples import PendingSamples
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.types import Sampling
from tests.contract.test_rollout_weights import FINGERPRINT, weights
from tests.support.rollout_samples import expected_tokens, prompt
from tests.support.rollout_server import rollout_process
from tests.support.teacher_process import TeacherProcess

SAMPLING = Sampling(max_new_tokens=6)


class Servers:
    """Two that can be killed and started anew at their addresses, with version 1 of the weights; who asks and sends."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._running = [self._start(), self._start()]
        self.addresses = [server.grpc for server in self._running]
        self.sender = stack.enter_context(WeightSender(self.addresses, bucket_bytes=2**20, deadline_s=150))
        self.pool = stack.enter_context(RolloutPool(self.addresses, job="test", deadline_s=150))
        self.new, self._salt = weights(1)
        assert self.sender.publish(1, FINGERPRINT, self.new) == frozenset()
        self.pool.note_weights(1, behind=())

    def kill(self, index: int) -> None:
        self._running[index].signal(signal.SIGKILL)
        self._running[index].process.wait()

    def restart(self, index: int, **engine: int) -> None:
        self._running[index] = self._start(port=int(self.addresses[index].split(":")[1]), **engine)

    def signal(self, index: int, number: signal.Signals) -> None:
        self._running[index].signal(number)

    def bring(self, version: int = 1) -> None:
        """The weights to whoever lacks them."""
        outdated = self.sender.outdated(version)
        assert outdated
        assert self.sender.publish(version, FINGERPRINT, self.new, to=outdated, needed=0) == frozenset()
        self.pool.note_weights(version, behind=())

    def ask(self, seed: int, *, newest: int = 1) -> PendingSamples:
        return self.pool.submit(prompt(), SAMPLING, num_samples=1, seed=seed, min_weight_version=newest)

    def expected(self, seed: int) -> list[int]:
        return expected_tokens(prompt(), seed, 6, salt=self._salt)

    def _start(self, port: int = 0, **engine: int) -> TeacherProcess:
        return self._stack.enter_context(
            rollout_process(self._directory, engine={"seconds_per_step": 0.01, **engine}, server={"port": port})
        )


@contextmanager
def running(directory: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(directory, stack)


def test_a_server_that_came_back_is_used_while_another_stays_dead(tmp_path: Path) -> None:
    with running(tmp_path) as servers:
        servers.kill(0)
        servers.kill(1)
        pending = servers.pool.submit(prompt(), SAMPLING, num_samples=2, seed=0, min_weight_version=1)
        servers.restart(0)
        assert not servers.pool.wait([pending])  # somebody must bring the weights
        assert not pending.is_done
        servers.bring()
        assert servers.pool.wait([pending])
        assert [sample.token_ids.tolist() for sample in pending.wait()] == [servers.expected(0), servers.expected(1)]
        assert servers.sender.publish(2, FINGERPRINT, servers.new, needed=1) == {servers.addresses[1]}


def test_a_server_that_came_back_narrower_is_left_out_until_it_is_as_wide_as_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[tuple[str, str]]:
        events = [record for record in caplog.records if record.message == "a rollout server is left out"]
        return [(vars(event)["address"], vars(event)["reason"]) for event in events]

    with running(tmp_path) as servers:
        began = servers.pool.describe().max_sequence_tokens
        servers.kill(0)
        servers.restart(0, max_sequence_tokens=32)
        while not told():
            assert servers.ask(7).wait()[0].token_ids.tolist() == servers.expected(7)
        reason = f"it takes prompts and responses of 32 tokens, and this job began with servers that take {began}"
        assert told() == [(servers.addresses[0], reason)]
        servers.kill(1)
        pending = servers.ask(8)
        servers.kill(0)
        servers.restart(0)
        assert not servers.pool.wait([pending])  # as of any that came back, somebody must bring the weights
        servers.bring()
        assert servers.pool.wait([pending])
        assert pending.wait()[0].token_ids.tolist() == servers.expected(8)
        assert len(told()) == 1


def test_a_server_that_was_left_behind_is_told_of_when_the_others_die(tmp_path: Path) -> None:
    with running(tmp_path) as servers:
        good, behind = servers.addresses
        servers.sender.publish(2, FINGERPRINT, servers.new, to={good})
        servers.pool.note_weights(2, behind={behind})
        servers.signal(0, signal.SIGSTOP)
        pending = servers.ask(0, newest=2)
        servers.kill(0)
        assert not servers.pool.wait([pending])
        servers.bring(2)
        assert servers.pool.wait([pending])
        assert pending.wait()[0].min_weight_version == 2


def test_a_server_that_came_back_is_told_of_while_others_sample_and_is_asked_when_it_has_the_weights(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as servers:
        servers.kill(1)
        servers.signal(0, signal.SIGSTOP)  # its samples take as long as this test wants
        pending = [servers.ask(seed) for seed in range(3)]
        servers.restart(1)
        assert not servers.pool.wait(pending)
        retries = servers.pool.stats().retries  # of what was sent to a server whose death was not noticed yet
        pending.append(servers.ask(3))
        assert not any(one.is_done for one in pending)
        servers.signal(0, signal.SIGCONT)
        servers.bring()
        assert servers.pool.wait(pending)
        for seed, one in enumerate(pending):
            (sample,) = one.wait()
            assert (sample.token_ids.tolist(), sample.min_weight_version) == (servers.expected(seed), 1)
        assert servers.pool.stats().retries == retries  # no server refused
