"""Pods of one node that share a teacher's memory through a directory, and no namespace of the host; by name only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.node import image
from tests.node.conftest import World
from tests.node.machine import NAME
from tests.node.pods import Object, until
from tests.node.release import Release, teacher
from tests.system.processes import ROOT

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]

_FILES = ("tests/support/far_client.py", "tests/support/teacher_requests.py")
_HOSTS = {"hostIPC", "hostPID", "hostNetwork"}


@pytest.mark.parametrize("mode", ["claim", "hostPath"])
def test_a_client_s_pod_reads_rows_out_of_the_teacher_s_memory(world: World, tmp_path: Path, mode: str) -> None:
    release = world.release(mode.lower(), tmp_path)
    place = tmp_path / "sockets"
    place.mkdir()
    more = {"node": NAME} if mode == "claim" else {"prepare": True}
    release.install(teacher(replicas=1, sharing={"mode": mode, "path": str(place), **more}))
    try:
        (server,) = world.pods.of("teacher", release.name)
        address = f"{server['status']['podIP']}:50051"
        (volume,) = [one for one in server["spec"]["volumes"] if one["name"] == "sharing"]
        near = _asked(world, release, address, volume)
        far = _asked(world, release, address, {"name": "sharing", "emptyDir": {}})
    finally:
        world.end(release)
    assert near["doors"].keys() == {"shm"} and near["is_right"]
    assert far["doors"].keys() == {"stream"} and far["is_right"]
    assert "no shared memory through" in far["doors"]["stream"]
    assert not _HOSTS & server["spec"].keys()
    (container,) = server["spec"]["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def _asked(world: World, release: Release, address: str, volume: Object) -> dict[str, Any]:
    """What a pod with this volume in place of the teacher's sockets gets."""
    name = f"{release.name}-client"
    files = {str(number): (ROOT / path).read_text("utf-8") for number, path in enumerate(_FILES)}
    world.pods.create({"metadata": {"name": name}, "data": files}, "configmaps")
    world.pods.create(_client(name, address, volume))

    def has_ended() -> bool:
        phase = (world.pods.get(name) or {})["status"]["phase"]
        assert phase != "Failed", world.pods.log(name)
        return phase == "Succeeded"

    until(has_ended)
    said: dict[str, Any] = {}
    for line in world.pods.log(name).splitlines():
        if line.startswith("{"):
            said |= json.loads(line)
    world.pods.delete(name)
    world.pods.delete(name, "configmaps")
    until(lambda: world.pods.get(name) is None)
    return said


def _client(name: str, address: str, volume: Object) -> Object:
    """As unprivileged as the teacher."""
    command = f"echo '50 1' | python -m tests.support.far_client auto exact 60 8 {address}"
    items = [{"key": str(number), "path": path} for number, path in enumerate(_FILES)]
    container = {
        "name": "client",
        "image": image.TEACHER,
        "command": ["sh", "-c", command],
        "env": [{"name": "PYTHONPATH", "value": "/client"}, {"name": "USER", "value": "kdmesh"}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "sharing", "mountPath": "/run/kdmesh"},
            {"name": "files", "mountPath": "/client"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001, "runAsNonRoot": True},
            "containers": [container],
            "volumes": [
                volume,
                {"name": "files", "configMap": {"name": name, "items": items}},
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    }
