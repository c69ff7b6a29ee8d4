"""Rollout servers with a real model, as processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.free_port import free_port
from tests.system.processes import Process, Processes


class Rollouts:
    """A server at an address of its own, started or not; every start is at the same address, with the first weights.

    It decodes one sample after the other.
    """

    def __init__(
        self,
        processes: Processes,
        directory: Path,
        model: Path,
        *,
        can_be_held: bool = False,
        **sections: Mapping[str, Any],
    ) -> None:
        """Start nothing yet. `sections` are laid over a small deterministic configuration."""
        self.address = f"127.0.0.1:{free_port()}"
        self.rest = f"http://127.0.0.1:{free_port()}"
        self._processes = processes
        self._directory = directory
        tree: dict[str, dict[str, Any]] = {
            "engine": {"kind": "transformers", "model": str(model), "device": "cpu", "deterministic": True},
            "server": {
                "port": int(self.address.split(":")[1]),
                "rest_port": int(self.rest.split(":")[2]),
                "drain_s": 5,
            },
        }
        for name, keys in sections.items():
            tree[name] = tree.get(name, {}) | keys
        directory.mkdir(parents=True)
        (directory / "rollout.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        self._hold = directory / "hold" if can_be_held else None
        self.process: Process

    def hold(self) -> None:
        """It is ready, and from now on draws nothing, until `let_go`."""
        assert self._hold is not None
        self._hold.touch()

    def let_go(self) -> None:
        """Let it draw."""
        assert self._hold is not None
        self._hold.unlink()

    def start(self) -> None:
        """Start the server; it takes requests later."""
        command = [sys.executable, "-m", "kdmesh_rollout", str(self._directory / "rollout.yaml")]
        if self._hold is not None:
            command[2:] = ["tests.system.held_rollouts", command[-1], str(self._hold)]
        self.process = self._processes.start("rollout", self._directory, *command)

    def wait_ready(self) -> None:
        """Return when it takes requests."""
        self.process.until(lambda: self.process.events("ready"))

    def get(self, path: str) -> Any:
        """The JSON that REST answers."""
        return httpx.get(f"{self.rest}{path}").json()

    def num_waiting(self) -> int:
        """Samples that it has not begun."""
        samples: int = self.get("/v1/queue")["waiting"]["samples"]
        return samples

    def weight_version(self) -> int:
        """Of the weights that it serves."""
        version: int = self.get("/v1/model")["weight_version"]
        return version
