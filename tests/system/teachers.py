"""Teacher servers with a real model, as processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.free_port import free_port
from tests.system.processes import Process, Processes


class Teacher:
    """A server at an address of its own, started or not; every start is at the same address."""

    def __init__(
        self,
        processes: Processes,
        directory: Path,
        model: Path,
        *,
        reading: Mapping[str, Any] | None = None,
        through: Sequence[str] = (),
        **sections: Mapping[str, Any],
    ) -> None:
        """Start nothing yet.

        Args:
            reading: what httpx needs to read its REST, where not everybody may.
            through: words before its command, which must become that command's process.
            sections: laid over a small deterministic configuration.
        """
        self.runtime_dir = directory / "runtime"
        self.address = f"127.0.0.1:{free_port()}"
        scheme = "https" if "tls" in sections.get("server", {}) else "http"
        self.rest = f"{scheme}://127.0.0.1:{free_port()}"
        self._reading = reading or {}
        self._through = through
        self._processes = processes
        self._directory = directory
        tree: dict[str, Mapping[str, Any]] = {
            "engine": {"kind": "transformers", "model": str(model), "device": "cpu", "deterministic": True},
            "server": {
                "port": int(self.address.split(":")[1]),
                "rest_port": int(self.rest.split(":")[2]),
                "runtime_dir": str(self.runtime_dir),
                "drain_s": 5,
            },
            "slab": {"slots": 16, "slot_mib": 0.25, "slots_per_session": 8},
            "queue": {},
            "cache": {},
            "jobs": {},
        }
        for name, keys in sections.items():
            tree[name] = tree.get(name, {}) | keys
        directory.mkdir(parents=True)
        self._tree = tree
        self.configure()
        self.process: Process

    def configure(self, **sections: Mapping[str, Any]) -> None:
        """From its next start on, these keys are laid over its configuration, and no others."""
        tree = self._tree | {name: self._tree.get(name, {}) | keys for name, keys in sections.items()}
        (self._directory / "teacher.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")

    def start(self) -> None:
        """Start the server; it takes requests later."""
        command = (*self._through, sys.executable, "-m", "kdmesh_teacher", str(self._directory / "teacher.yaml"))
        self.process = self._processes.start("teacher", self._directory, *command)

    def wait_ready(self) -> None:
        """Return when it takes requests."""
        self.process.until(lambda: self.process.events("ready"))

    def get(self, path: str) -> Any:
        """The JSON that REST answers."""
        return httpx.get(f"{self.rest}{path}", **self._reading).json()

    def slots(self, job: str) -> list[int]:
        """Slots of each of a job's sessions, the most first."""
        sessions = self.get("/v1/sessions")["sessions"]
        return sorted((session["slots"] for session in sessions if session["job"] == job), reverse=True)

    def num_answered(self, job: str) -> int:
        """Requests of a job that were answered with rows."""
        return self._count("requests", kdmesh_job=job, outcome="ok")

    def num_prefilled(self, job: str) -> int:
        """Tokens that were computed for a job."""
        return self._count("tokens", kdmesh_job=job)

    def num_kept(self, job: str) -> int:
        """Tokens of sequences whose rows a job got from the cache."""
        return self._count("cache_hit_tokens", kdmesh_job=job)

    def _count(self, counter: str, **labels: str) -> int:
        families = text_string_to_metric_families(httpx.get(f"{self.rest}/metrics", **self._reading).text)
        samples = [sample for family in families for sample in family.samples]
        name = f"kdmesh_teacher_{counter}_total"
        return sum(int(sample.value) for sample in samples if sample.name == name and sample.labels == labels)
