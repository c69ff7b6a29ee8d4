"""What the chart's pods run, run here as processes: a server, the test that asks it, and what fetches a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.support.certificates import CertificateAuthority
from tests.support.chart_pods import here, mount, running
from tests.support.hub import Repository, hub
from tests.support.rendered_chart import Manifest, ci_values, containers, pods, rendered, rendered_with
from tests.support.teacher_process import wait_event

_GUARDED = (
    "auth.allowAnonymous=false",
    'auth.tokensSecret.name="tokens"',
    'tls.existingSecret="certificate"',
    "rollout.enabled=false",
    "test.enabled=true",
)
_MODEL, _REVISION = "Qwen/Qwen3-235B-A22B", "8efa61729e4c0c4d4b2f0b8b6c0f5a8d3b1e2f4a"  # of the ci values
_TOKEN = "0123456789abcdef"
_HUB_TOKEN = "hf_of_the_secret"
_OPERATOR = {"Authorization": f"Bearer {_TOKEN}"}


def test_a_server_runs_as_its_pod_says_and_the_release_s_test_finds_it_ready(tmp_path: Path) -> None:
    manifests = rendered_with(*_GUARDED, values="drills")
    (server, asking) = [pod for _, pod in pods(manifests)]
    mount(server, manifests, tmp_path, _secrets(tmp_path))
    (container,) = server["spec"]["containers"]
    ports = ("--set", "server.port=0", "--set", "server.rest_port=0")
    variables = {"POD_NAME": "demo-teacher-0"}
    with running(server, tmp_path, *ports, variables=variables, environment=os.environ) as process:
        ready = wait_event(process, "ready")
        grpc, rest = (f"127.0.0.1:{ready[key].rpartition(':')[2]}" for key in ("grpc", "rest"))
        done = _ask(asking, tmp_path, f"https://{rest}", grpc)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"https://{rest}/readyz: 200\n{grpc}: serving\n"
        assert _probed(container, rest) == [200, 200, 200]
        sleep = {"tags": ["weights"], "drain_s": 10}
        asked = httpx.post(f"https://{rest}/v1/sleep", json=sleep, headers=_OPERATOR, verify=False)
        assert asked.status_code == 200
        assert _probed(container, rest) == [200, 200, 200]  # or no job would find it to wake it
        done = _ask(asking, tmp_path, f"https://{rest}", grpc)
        assert done.returncode != 0 and "503" in done.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    done = _ask(asking, tmp_path, f"https://{rest}", grpc)
    assert done.returncode != 0 and "Connection refused" in done.stderr


def test_a_model_is_fetched_once_and_whole(tmp_path: Path) -> None:
    files = {"config.json": b'{"model_type": "qwen3"}', "model.safetensors": bytes(range(256)) * 64}
    with hub(Repository(name=_MODEL, commit=_REVISION, files=files, token=_HUB_TOKEN)) as (address, asked):
        target, done = _fetch(tmp_path, address)
        assert done.returncode == 0, done.stderr
        assert {name: (target / name).read_bytes() for name in files} == files
        asked.clear()
        assert _fetch(tmp_path, address)[1].returncode == 0
        assert asked == []


def test_a_model_that_did_not_come_whole_is_not_taken_for_one(tmp_path: Path) -> None:
    cut = Repository(
        name=_MODEL,
        commit=_REVISION,
        files={"config.json": b"{}"},
        listed=("config.json", "model.safetensors"),
        token=_HUB_TOKEN,
    )
    with hub(cut) as (address, _):
        target, done = _fetch(tmp_path, address)
    assert done.returncode != 0 and (target / "config.json").exists()
    again, done = _fetch(tmp_path, address)  # now nobody answers there
    assert done.returncode != 0 and not (again / ".complete").exists()


def _secrets(root: Path) -> dict[str, dict[str, str]]:
    authority = CertificateAuthority(root)
    pair = authority.issue("server", ["localhost"])
    files = {"tls.crt": pair.cert, "tls.key": pair.key, "ca.crt": authority.cert}
    return {
        "tokens": {"tokens.yaml": f"tokens: [{{name: ann, role: operator, token: {_TOKEN}}}]"},
        "certificate": {key: path.read_text("utf-8") for key, path in files.items()},
    }


def _probed(container: dict[str, Any], rest: str) -> list[int]:
    """What Kubernetes is answered."""
    asked = [container[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    urls = [f"{target['scheme'].lower()}://{rest}{target['path']}" for target in asked]
    return [httpx.get(url, verify=False).status_code for url in urls]


def _ask(pod: Manifest, root: Path, *places: str) -> subprocess.CompletedProcess[str]:
    (container,) = pod["spec"]["containers"]
    script, *_ = container["args"]
    command = [sys.executable, *container["command"][1:], here(script, root), *places]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _fetch(root: Path, address: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run what fetches the model of a pod; where to, and how that ended."""
    (pod,) = [pod for where, pod in pods(rendered(ci_values("several-nodes"))) if where.endswith("leaderTemplate")]
    (container,) = [one for one in containers(pod) if one["name"] == "fetch-model"]
    fixed = {one["name"]: here(one["value"], root) for one in container["env"] if "value" in one}
    environment = {**os.environ, **fixed, "HOME": str(root), "HF_ENDPOINT": address, "HF_TOKEN": _HUB_TOKEN}
    command = [sys.executable, *container["command"][1:], *container["args"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return Path(fixed["TARGET"]), done
