"""The chart installed, upgraded and rolled back on a real node, whose kubelet probes the pods; by name only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.node.asking import Asking
from tests.node.conftest import World
from tests.node.pods import Object, at_s, is_ready, until
from tests.node.release import SMALL, Release, teacher
from tools.helm_chart.render import Helm

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]

SLOTS = {"config": {**SMALL["teacher"]["config"], "slab": {"slots": 6, "slot_mib": 1}}}
# The schema has nothing against it, and the server cannot start with it.
BROKEN = {"model": {"uri": "/nowhere"}, "config": {"engine": {"kind": "transformers", "device": "cpu"}}}


@pytest.fixture(scope="module")
def release(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """Of two teachers."""
    made = world.release("qwen", tmp_path_factory.mktemp("release"))
    made.install(SMALL)
    yield made
    world.end(made)


def slots(pod: Object) -> int:
    """That a server says it has."""
    states: dict[str, int] = _get(pod, "/v1/slab").json()["slots"]
    return sum(states.values())


@contextmanager
def stopped(pod_name: str) -> Iterator[None]:
    """The processes of a pod stand still."""
    processes = [process for process in psutil.process_iter() if _host_of(process) == pod_name]
    assert processes
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def _host_of(process: psutil.Process) -> str | None:
    with suppress(psutil.Error):
        environment: dict[str, str] = process.environ()
        return environment.get("HOSTNAME")
    return None


def test_an_installed_release_is_ready_and_its_test_finds_it(world: World, release: Release) -> None:
    pods = world.pods.of("teacher", release.name)
    assert [pod["metadata"]["name"] for pod in pods] == ["qwen-teacher-0", "qwen-teacher-1"]
    assert all(is_ready(pod) for pod in pods)
    assert world.pods.ready_addresses(release.teacher) == {pod["status"]["podIP"] for pod in pods}
    assert release.history() == ["deployed"]
    release.test()


def test_a_pod_is_ready_once_its_server_is_and_not_before(world: World, release: Release) -> None:
    for pod in world.pods.of("teacher", release.name):
        (ready,) = world.pods.events(pod["metadata"]["name"], "ready")
        (condition,) = [one for one in pod["status"]["conditions"] if one["type"] == "Ready"]
        assert at_s(condition["lastTransitionTime"]) >= int(at_s(ready["time"]))
        (container,) = pod["status"]["containerStatuses"]
        assert container["started"] is True and container["restartCount"] == 0


def test_a_pod_that_sleeps_stays_in_its_service_and_one_that_answers_nobody_does_not(
    world: World, release: Release
) -> None:
    names = [pod["metadata"]["name"] for pod in world.pods.of("teacher", release.name)]
    first, second = (pod["status"]["podIP"] for pod in world.pods.of("teacher", release.name))
    slept = httpx.post(f"http://{first}:8051/v1/sleep", json={"tags": ["weights"], "drain_s": 10}, timeout=60)
    assert slept.status_code == 200, slept.text
    assert httpx.get(f"http://{first}:8051/readyz").status_code == 503
    with stopped(names[1]):
        # By now the kubelet has asked the one that sleeps as often as the one that it took out.
        until(lambda: world.pods.ready_addresses(release.teacher) == {first})
    woken = httpx.post(f"http://{first}:8051/v1/wake", json={"tags": ["weights"]}, timeout=60)
    assert woken.status_code == 200, woken.text
    until(lambda: world.pods.ready_addresses(release.teacher) == {first, second})
    for pod in world.pods.of("teacher", release.name):
        assert pod["status"]["containerStatuses"][0]["restartCount"] == 0


def test_an_upgrade_and_a_rollback_replace_all_pods_and_a_client_gets_every_row(world: World, release: Release) -> None:
    before = {pod["metadata"]["uid"] for pod in world.pods.of("teacher", release.name)}
    with Asking(release.teacher) as asking:
        until(lambda: asking.num_answers > 10)
        release.upgrade(teacher(**SLOTS))
        changed = world.pods.of("teacher", release.name)
        assert [slots(pod) for pod in changed] == [6, 6]
        release.roll_back(1)
        restored = world.pods.of("teacher", release.name)
        assert [slots(pod) for pod in restored] == [4, 4]
        after = asking.num_answers
        until(lambda: asking.num_answers > after)
    uids = before | {pod["metadata"]["uid"] for pod in (*changed, *restored)}
    assert len(uids) == 6
    assert release.history() == ["superseded", "superseded", "deployed"]


def test_a_pod_that_cannot_start_says_why_and_the_other_one_serves_until_a_rollback(
    world: World, release: Release
) -> None:
    good = len(release.history())
    name = f"{release.teacher}-1"

    def why() -> str:
        containers = (world.pods.get(name) or {}).get("status", {}).get("containerStatuses", ())
        return "".join(one["lastState"].get("terminated", {}).get("message", "") for one in containers)

    with Asking(release.teacher) as asking:
        release.upgrade(teacher(**BROKEN), waits=False)
        until(lambda: "/nowhere" in why())
        after = asking.num_answers
        until(lambda: asking.num_answers > after)
        assert is_ready(world.pods.of("teacher", release.name)[0])
        release.roll_back(good)
    assert all(is_ready(pod) for pod in world.pods.of("teacher", release.name))


@pytest.mark.parametrize("helm", ["helm3"])
def test_the_older_helm_installs_upgrades_and_rolls_back_as_well(world: World, tmp_path: Path, helm: Helm) -> None:
    release = world.release("older", tmp_path, helm)
    release.install(teacher(replicas=1))
    try:
        release.upgrade(teacher(replicas=1, **SLOTS))
        release.roll_back(1)
        assert [slots(pod) for pod in world.pods.of("teacher", release.name)] == [4]
        assert release.history() == ["superseded", "superseded", "deployed"]
    finally:
        world.end(release)


def _get(pod: Object, path: str) -> Any:
    return httpx.get(f"http://{pod['status']['podIP']}:8051{path}", timeout=60)
