"""Images are built, and a distillation runs in them to its end, under a real Docker daemon; as root, by name only."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.containers.docker import ROOT, SERVICES, Docker, build, building, running

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3600)]

BRIEF = {"MODELS": "--brief", "STEPS": "8"}
ENDLESS = {"MODELS": "--brief", "STEPS": "100000"}
_PATIENCE_S = 600.0


@pytest.fixture(scope="module")
def bill_of_materials() -> dict[str, Any]:
    """Of an image, once all are built; by the command of docs/containers.md."""
    page = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    command = re.search(r"kdmesh-teacher -c '(.+?)' > sbom\.json", page, re.DOTALL)
    assert command is not None
    with building() as docker:
        build(docker)
        run = ("run", "--rm", "--network=host", "--user=0", "--entrypoint=sh", "kdmesh-teacher", "-c", command[1])
        bill: dict[str, Any] = json.loads(docker.run(*run))
    return bill


@pytest.fixture(scope="module")
def docker(bill_of_materials: dict[str, Any]) -> Iterator[Docker]:
    with running() as docker:
        yield docker


@pytest.fixture(scope="module")
def finished(docker: Docker) -> Iterator[Docker]:
    """The project, when its trainer has ended."""
    docker.compose("up", "--detach", "--no-build", **BRIEF)
    try:
        until(lambda: state(docker, "trainer")["State"] == "exited")
        yield docker
    finally:
        docker.compose("--profile=observability", "down", "--volumes")


def until(is_so: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s, f"it was not so within {_PATIENCE_S} s"


def state(docker: Docker, service: str) -> dict[str, Any]:
    """Of a service's container."""
    lines = docker.compose("ps", "--all", "--format=json", service).splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def events(docker: Docker, service: str, event: str) -> list[dict[str, Any]]:
    """What a service has logged."""
    lines = docker.compose("logs", "--no-log-prefix", "--no-color", service).splitlines()
    found = [json.loads(line[line.index("{") :]) for line in lines if '{"time"' in line]
    return [line for line in found if line["event"] == event]


def ask(docker: Docker, url: str) -> str:
    """What a URL answers inside the project's network."""
    code = f"import urllib.request as r; print(r.urlopen({url!r}).read().decode())"
    return docker.compose("exec", "--no-TTY", "teacher", "python3", "-c", code)


def test_an_image_lists_what_is_in_it(bill_of_materials: dict[str, Any]) -> None:
    names = {component["name"] for component in bill_of_materials["components"]}
    assert bill_of_materials["bomFormat"] == "CycloneDX"
    assert {"kdmesh", "torch", "grpcio", "transformers"} <= names


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_is_unprivileged_and_says_what_it_is(docker: Docker, service: str) -> None:
    (image,) = json.loads(docker.run("image", "inspect", f"kdmesh-{service}"))
    assert image["Config"]["User"] == "10001:10001"
    assert image["Config"]["Labels"]["org.opencontainers.image.title"] == f"kdmesh {service}"
    said = docker.run("run", "--rm", "--entrypoint=sh", f"kdmesh-{service}", "-c", "id -u; kdmesh --version")
    assert said.splitlines()[0] == "10001"
    assert "Usage" in docker.run("run", "--rm", "--read-only", f"kdmesh-{service}", "--help")


def test_images_share_all_layers_but_the_last_few(docker: Docker) -> None:
    layers = [json.loads(docker.run("image", "inspect", f"kdmesh-{name}"))[0]["RootFS"]["Layers"] for name in SERVICES]
    shared = [one for one, *others in zip(*layers, strict=False) if set(others) == {one}]
    sizes = [json.loads(docker.run("image", "inspect", f"kdmesh-{name}"))[0]["Size"] for name in SERVICES]
    assert len(shared) >= len(layers[0]) - 2
    assert max(sizes) < 3e9


def test_a_distillation_runs_to_its_end_and_containers_share_memory(finished: Docker) -> None:
    assert state(finished, "trainer")["ExitCode"] == 0
    assert [line["door"] for line in events(finished, "trainer", "rows have a door")] == ["shm"]
    assert {line["door"] for line in events(finished, "trainer", "weights on their way")} == {"shm"}
    assert events(finished, "rollout", "weights replaced")[-1]["version"] >= 8
    look = ("run", "--rm", "--no-deps", "--entrypoint=sh", "trainer", "-c")
    assert "model.safetensors" in finished.compose(*look, "ls /runs/on-policy/final", **BRIEF)


def test_prometheus_reads_all_services_and_knows_the_rules(finished: Docker) -> None:
    finished.compose("--profile=observability", "up", "--detach", "--no-build", "prometheus", "trainer", **ENDLESS)

    def query(expr: str) -> list[dict[str, Any]]:
        answer = json.loads(ask(finished, f"http://prometheus:9090/api/v1/query?query={quote(expr)}"))
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    until(lambda: {one["metric"]["job"] for one in query("up == 1")} == {"teacher", "rollout", "trainer"})
    until(lambda: query("kdmesh_trainer:bound:ratio5m"))
    rules = json.loads(ask(finished, "http://prometheus:9090/api/v1/rules"))["data"]["groups"]
    assert {group["name"] for group in rules} >= {"kdmesh.alerts", "kdmesh.teacher"}
    finished.compose("stop", "prometheus", **ENDLESS)


def test_stop_ends_a_job_with_a_checkpoint_and_servers_when_they_are_done(finished: Docker) -> None:
    finished.compose("up", "--detach", "--no-build", "trainer", **ENDLESS)
    steps = len(events(finished, "trainer", "weights published"))
    until(lambda: len(events(finished, "trainer", "weights published")) > steps + 2)
    finished.compose("stop", **ENDLESS)
    assert {service: state(finished, service)["ExitCode"] for service in SERVICES} == dict.fromkeys(SERVICES, 0)
    assert events(finished, "trainer", "stopped")
    assert events(finished, "trainer", "checkpoint written")
    for server in ("teacher", "rollout"):
        assert events(finished, server, "draining")
        assert not events(finished, server, "drain time is over")
