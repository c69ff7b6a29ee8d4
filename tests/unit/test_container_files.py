"""Dockerfiles and compose files: linted, closed, and agreeing with what they name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdmesh.config import load
from kdmesh_rollout.config import RolloutConfig
from kdmesh_teacher.config import TeacherConfig
from kdmesh_trainer.config import TrainerConfig
from tools.generate_constraints import EXTRAS

ROOT = Path(__file__).parents[2]
DOCKERFILES = {path.stem: path for path in sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))}
OURS = ("models", "teacher", "rollout", "trainer")
COMPOSE = ROOT / ".cache" / "compose" / "usr" / "libexec" / "docker"
HEALTHY = ROOT / "deploy" / "docker" / "healthy.py"


def instructions(service: str) -> list[tuple[str, str]]:
    """Of a Dockerfile, with their arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILES[service].read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(kind, rest) for kind, _, rest in (line.partition(" ") for line in lines if line)]


def compose() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return tree


def test_every_service_has_a_dockerfile_that_the_linter_has_nothing_against() -> None:
    assert set(DOCKERFILES) == {"teacher", "rollout", "trainer"}
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, *DOCKERFILES.values()], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("service", DOCKERFILES)
def test_an_image_is_pinned_unprivileged_and_gets_signals_itself(service: str) -> None:
    found = instructions(service)
    assert [rest for kind, rest in found if kind == "ARG" and rest.startswith("BASE=")] == [
        "BASE=python:3.11.14-slim-bookworm"
    ]
    assert [rest for kind, rest in found if kind == "USER"] == ["10001:10001"]
    last = dict(found)
    assert last["ENTRYPOINT"].startswith("[")
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert ("healthy.py" in last["HEALTHCHECK"]) == (service != "trainer")
    assert {"title", "description", "version", "revision"} == set(
        re.findall(r"opencontainers.image.(\w+)", last["LABEL"])
    )


def test_images_are_built_by_the_same_steps_so_that_they_share_layers() -> None:
    stages = []
    for service in DOCKERFILES:
        found = instructions(service)
        stages.append(found[: found.index(("COPY", "--from=build /opt/kdmesh /opt/kdmesh")) + 1])
    assert stages[0] == stages[1] == stages[2]


def test_what_images_copy_is_not_ignored_and_secrets_are() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for service in DOCKERFILES
        for kind, rest in instructions(service)
        if kind == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


@pytest.mark.parametrize("service", DOCKERFILES)
def test_images_have_the_extras_that_are_pinned(service: str) -> None:
    assert f'EXTRAS="{" ".join(EXTRAS)}"' in [rest for kind, rest in instructions(service) if kind == "ARG"]


@pytest.mark.parametrize("service", DOCKERFILES)
def test_every_stage_is_built_on_what_the_build_argument_names(service: str) -> None:
    assert [rest for kind, rest in instructions(service) if kind == "FROM"] == ["${BASE} AS build", "${BASE}"]


def test_constraints_pin_every_dependency_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(text for extra in EXTRAS for text in project["optional-dependencies"][extra]),
    ]
    names = {re.split(r"[<>=\[]", text)[0] for text in wanted} - {"torch"}
    lines = (ROOT / "deploy" / "docker" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert names <= pinned


@pytest.mark.parametrize("service", OURS)
def test_a_service_of_the_compose_file_is_confined(service: str) -> None:
    found = compose()["services"][service]
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in found.get("ports", ()))


def test_every_port_is_published_on_loopback_only() -> None:
    ports = [port for service in compose()["services"].values() for port in service.get("ports", ())]
    assert len(ports) == 6
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.gpu.yml"])
def test_every_file_that_a_container_is_given_exists(name: str) -> None:
    mounted = re.findall(r"^\s+- (\./deploy/[^:]+):", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(mounted) >= 3
    assert [path for path in mounted if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("suffix", ["", "-gpu"])
def test_the_configurations_of_containers_load_and_meet_each_other(suffix: str) -> None:
    folder = ROOT / "deploy" / "compose"
    teacher = load(TeacherConfig, folder / f"teacher{suffix}.yaml")
    rollout = load(RolloutConfig, folder / f"rollout{suffix}.yaml")
    trainer = load(TrainerConfig, folder / f"train{suffix}.yaml")
    assert trainer.teacher is not None
    assert trainer.teacher.addresses == (f"teacher:{teacher.server.port}",)
    assert trainer.source.kind == "on_policy"
    assert trainer.source.rollouts.addresses == (f"rollout:{rollout.server.port}",)
    assert teacher.server.runtime_dir == Path("/run/kdmesh")
    assert trainer.metrics is not None
    prometheus = yaml.safe_load((folder / "prometheus.yml").read_text(encoding="utf-8"))
    targets = [
        target for job in prometheus["scrape_configs"] for one in job["static_configs"] for target in one["targets"]
    ]
    assert targets == [
        f"teacher:{teacher.server.rest_port}",
        f"rollout:{rollout.server.rest_port}",
        f"trainer:{trainer.metrics.port}",
    ]


@pytest.mark.skipif(not COMPOSE.exists(), reason="run `make compose-env`")
@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "docker-compose.gpu.yml"]])
def test_compose_understands_its_files(files: list[str]) -> None:
    command = [COMPOSE / "cli-plugins" / "docker-compose", *(f"--file={ROOT / name}" for name in files)]
    for profile in ([], ["--profile=observability"]):
        result = subprocess.run([*command, *profile, "config", "--quiet"], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.gpu.yml"])
def test_every_image_of_compose_can_be_named_by_a_variable(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"(?:image|BASE): \"?([^\s\",}]+\}?)", text)
    assert len(named) >= 5
    assert [image for image in named if not re.fullmatch(r"\$\{[A-Z]+_IMAGE:-[^}]+\}", image)] == []


@pytest.mark.skipif(not COMPOSE.exists(), reason="run `make compose-env`")
def test_compose_takes_images_by_their_digests() -> None:
    services = ("teacher", "rollout", "trainer", "prometheus", "grafana")
    pinned = {name: f"registry.example/{name}:1@sha256:{index:064x}" for index, name in enumerate(services)}
    base = f"python:3.11@sha256:{9:064x}"
    variables = {f"{name.upper()}_IMAGE": image for name, image in pinned.items()} | {"BASE_IMAGE": base}
    command = [COMPOSE / "cli-plugins" / "docker-compose", f"--file={ROOT / 'docker-compose.yml'}"]
    result = subprocess.run(
        [*command, "--profile=observability", "config", "--format=json"],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    found = json.loads(result.stdout)["services"]
    assert {name: found[name]["image"] for name in services} == pinned
    assert {found[name]["build"]["args"]["BASE"] for name in OURS} == {base}


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that always answers so; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/readyz"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_a_container_is_healthy_when_its_server_is_ready(status: int, code: int) -> None:
    with answering(status) as url:
        result = subprocess.run(
            [sys.executable, HEALTHY],
            env={**os.environ, "KDMESH_HEALTH_URL": url, "http_proxy": "http://127.0.0.1:9"},  # nobody there
            capture_output=True,
        )
    assert result.returncode == code, result.stderr
