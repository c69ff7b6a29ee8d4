"""What the chart's pods run, run here as processes: a server, the test that asks it, and what fetches a model."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.support.certificates import CertificateAuthority
from tests.support.chart_pods import here, mount, running
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
    with _hub(_MODEL, _REVISION, files) as (address, asked):
        target, done = _fetch(tmp_path, address)
        assert done.returncode == 0, done.stderr
        assert {name: (target / name).read_bytes() for name in files} == files
        asked.clear()
        assert _fetch(tmp_path, address)[1].returncode == 0
        assert asked == []


def test_a_model_that_did_not_come_whole_is_not_taken_for_one(tmp_path: Path) -> None:
    with _hub(_MODEL, _REVISION, {"config.json": b"{}"}, listed=("config.json", "model.safetensors")) as (address, _):
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


def _fetch(root: Path, hub: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run what fetches the model of a pod; where to, and how that ended."""
    (pod,) = [pod for where, pod in pods(rendered(ci_values("several-nodes"))) if where.endswith("leaderTemplate")]
    (container,) = [one for one in containers(pod) if one["name"] == "fetch-model"]
    fixed = {one["name"]: here(one["value"], root) for one in container["env"] if "value" in one}
    environment = {**os.environ, **fixed, "HOME": str(root), "HF_ENDPOINT": hub, "HF_TOKEN": "hf_of_the_secret"}
    command = [sys.executable, *container["command"][1:], *container["args"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return Path(fixed["TARGET"]), done


@contextmanager
def _hub(
    model: str, commit: str, files: dict[str, bytes], listed: Sequence[str] = ()
) -> Iterator[tuple[str, list[str]]]:
    """Answers what the client of Hugging Face's hub asks, to who has the token; and what was asked."""
    asked: list[str] = []
    names = listed or tuple(files)

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            asked.append(path)
            if self.headers["Authorization"] != "Bearer hf_of_the_secret":
                self._say(401, b"")
            elif path == f"/api/models/{model}/revision/{commit}":
                siblings = [{"rfilename": name} for name in names]
                self._say(200, json.dumps({"id": model, "sha": commit, "siblings": siblings}).encode())
            elif path == f"/api/models/{model}/tree/{commit}":
                tree = [{"type": "file", "path": name, "size": len(files.get(name, b"")), "oid": "0"} for name in names]
                self._say(200, json.dumps(tree).encode())
            elif path.startswith(f"/{model}/resolve/{commit}/") and path.rpartition("/")[2] in files:
                self._say(200, files[path.rpartition("/")[2]])
            else:
                self._say(404, b"")

        do_HEAD = do_GET

        def _say(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()
