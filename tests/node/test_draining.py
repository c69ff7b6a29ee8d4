"""How pods of the chart end on a real node: deleted, and evicted against their budget; by name only."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest
import torch

from kdmesh.rpc.teachers.pool import TeacherPool
from tests.node.conftest import World
from tests.node.pods import at_s, events, is_ready, until
from tests.node.release import SMALL, Release, teacher
from tests.support.teacher_requests import expected_rows, sequence

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]

PRE_STOP_S = 12  # the Service forgets a pod within a second or two; the machine may be busy
BATCH_S = 16.0  # longer than that, so that a request of the last moment is answered while the server drains


@pytest.fixture(scope="module")
def release(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    made = world.release("drain", tmp_path_factory.mktemp("drain"))
    engine = {"kind": "fake", "seconds_per_batch": BATCH_S}
    made.install(teacher(preStopSeconds=PRE_STOP_S, config={**SMALL["teacher"]["config"], "engine": engine}))
    yield made
    world.end(made)


def test_a_deleted_pod_serves_on_then_drains_then_ends(world: World, release: Release) -> None:
    pod = world.pods.of("teacher", release.name)[0]
    name, address = pod["metadata"]["name"], pod["status"]["podIP"]
    asked, log = [sequence(20)], list[str]()
    with TeacherPool([f"{address}:50051"], job="last", door="stream", deadline_s=60) as pool:
        threading.Timer(1.0, world.pods.delete, (name,)).start()

        def is_going() -> bool:
            return address not in world.pods.ready_addresses(release.teacher)

        until(is_going)
        # Nobody new is sent to it, and who has it still gets answers.
        assert httpx.get(f"http://{address}:8051/readyz", timeout=10).status_code == 200
        pending = pool.submit(asked)
        told, *_, last = world.pods.until_gone(name, log)
        assert torch.equal(pending.wait().rows_RD, expected_rows(asked))
    grace_s = told["metadata"]["deletionGracePeriodSeconds"]
    assert grace_s == PRE_STOP_S + 20 + 30
    told_s = at_s(told["metadata"]["deletionTimestamp"]) - grace_s
    (draining,) = events(log, "draining")
    assert at_s(draining["time"]) >= told_s + PRE_STOP_S
    assert not events(log, "drain time is over")
    (container,) = last["status"]["containerStatuses"]
    ended = container["state"]["terminated"]
    assert ended["exitCode"] == 0 and ended["reason"] == "Completed"
    assert at_s(draining["time"]) < at_s(ended["finishedAt"]) + 1 < told_s + grace_s


def test_pods_are_evicted_one_at_a_time(world: World, release: Release) -> None:
    until(lambda: [is_ready(pod) for pod in world.pods.of("teacher", release.name)] == [True, True])
    first, second = (pod["metadata"]["name"] for pod in world.pods.of("teacher", release.name))
    until(lambda: world.pods.evict(first)[0] == 201)  # once the budget has counted them
    assert world.pods.evict(second) == (429, "Cannot evict pod as it would violate the pod's disruption budget.")
    until(lambda: world.pods.evict(second)[0] == 201)
    assert is_ready(world.pods.get(first) or {})
    until(lambda: [is_ready(pod) for pod in world.pods.of("teacher", release.name)] == [True, True])
