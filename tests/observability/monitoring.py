"""A real Prometheus, a real Alertmanager, and somebody who is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.free_port import free_port
from tests.support.promql import FILES, PROMTOOL
from tests.system.processes import Process, Processes


class Webhook:
    """Where Alertmanager sends alerts.

    Attributes:
        names: of the alerts that came, firing.
    """

    def __init__(self, port: int, names: set[str]) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self.names = names


@contextmanager
def webhook() -> Iterator[Webhook]:
    """While the context lasts."""
    names: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            names.update(alert["labels"]["alertname"] for alert in body["alerts"] if alert["status"] == "firing")
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Webhook(server.server_port, names)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Prometheus:
    """It reads every second, with the rules of the chart; an alert fires a second after it could."""

    def __init__(self, processes: Processes, directory: Path, scrapes: Sequence[Mapping[str, Any]], told: str) -> None:
        """Start it, and an Alertmanager that tells `told`."""
        self._url = f"http://127.0.0.1:{free_port()}"
        alertmanager = f"127.0.0.1:{free_port()}"
        directory.mkdir(parents=True)
        route = {"receiver": "hook", "group_wait": "0s", "group_interval": "1s", "group_by": ["..."]}
        receivers = [{"name": "hook", "webhook_configs": [{"url": told}]}]
        _write(directory / "alertmanager.yaml", {"route": route, "receivers": receivers})
        rules = [_impatient(directory, name) for name in ("recording", "alerts")]
        _write(
            directory / "prometheus.yaml",
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(path) for path in rules],
                "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
                "scrape_configs": list(scrapes),
            },
        )
        binaries = PROMTOOL.parent
        processes.start(
            "alertmanager",
            directory,
            # Debian's reads its templates from below /usr/share; here they are there for it alone.
            *("unshare", "--map-root-user", "--mount", "sh", "-c", 'mount --bind "$0" /usr/share && exec "$@"'),
            str(binaries.parent / "share"),
            str(binaries / "prometheus-alertmanager"),
            "--config.file=alertmanager.yaml",
            "--storage.path=alertmanager",
            "--cluster.listen-address=",
            f"--web.listen-address={alertmanager}",
        )
        self.process: Process = processes.start(
            "prometheus",
            directory,
            str(binaries / "prometheus"),
            "--config.file=prometheus.yaml",
            "--storage.tsdb.path=data",
            f"--web.listen-address={self._url.removeprefix('http://')}",
        )
        self.process.until(self._is_ready)

    def query(self, expr: str) -> list[Any]:
        """What it answers now."""
        answer = httpx.get(f"{self._url}/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", answer
        result: list[Any] = answer["data"]["result"]
        return result

    def metric_names(self) -> set[str]:
        """Of everything that it has read."""
        return set(httpx.get(f"{self._url}/api/v1/label/__name__/values").json()["data"])

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self._url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False


def _impatient(directory: Path, name: str) -> Path:
    """A copy of a file of rules whose alerts need not hold for long."""
    tree = yaml.safe_load((FILES / "rules" / f"{name}.yaml").read_text(encoding="utf-8"))
    for group in tree["groups"]:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
    _write(directory / f"{name}.yaml", tree)
    return directory / f"{name}.yaml"


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
