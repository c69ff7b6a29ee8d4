"""Training jobs as processes, and the record that each leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.system.gate import Gate
from tests.system.processes import Process, Processes

KDMESH = str(Path(sys.executable).with_name("kdmesh"))

# All other figures of a record must be the same to the last bit.
_MAY_DIFFER = {
    "time",
    "step_s",
    "tokens_per_second",
    "teacher_wait_s",
    "teacher_wait_fraction",
    "sampling_wait_s",
    "sampling_s",
    "bounded_by",
    "phase_tokens_per_second",
    "phase_s",
    "evaluate_s",
    "examine_s",
    "teacher_imbalance",
}


def lines(output: Path) -> list[dict[str, Any]]:
    """What the record of the run that writes to `output` says so far."""
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def record(output: Path) -> list[dict[str, Any]]:
    """Of it every figure that must not depend on what happened around the run."""
    return [
        {key: value for key, value in line.items() if key.partition(".")[0] not in {*_MAY_DIFFER, "door"}}
        for line in lines(output)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a job learns, and from what; not where its teacher is."""

    student: Path
    data: Path  # directory with train.jsonl and held_out.jsonl
    objective: Mapping[str, Any]
    is_judged: bool = False  # on held-out data


class Job:
    """One job in a directory of its own; the directory's name is also the job's name at its teachers."""

    def __init__(
        self,
        processes: Processes,
        directory: Path,
        recipe: Recipe,
        *teachers: str,
        teacher: Mapping[str, Any] | None = None,
        **sections: Any,
    ) -> None:
        """Start nothing yet.

        Args:
            teachers: addresses of the only one; none where `sections` name others, or there is no teacher.
            teacher: more keys of the configuration's `teacher` section.
            sections: replace whole sections of it.
        """
        directory.mkdir(parents=True)
        self.config = directory / "train.yaml"
        self.output = directory / directory.name
        self._processes = processes
        self._directory = directory
        data: dict[str, Any] = {"max_tokens": 96}
        data["train"] = {"format": "chat", "path": str(recipe.data / "train.jsonl")}
        if recipe.is_judged:
            data["held_out"] = {"format": "chat", "path": str(recipe.data / "held_out.jsonl")}
        self._tree = {
            "output": str(self.output),
            "student": {"model": str(recipe.student), "device": "cpu"},
            "teacher": {"addresses": list(teachers), "prefetch": 4, "deadline_s": 100, **(teacher or {})}
            if teachers
            else None,
            "objective": {"name": "distill", **recipe.objective},
            "data": data,
            "batch": {"sequences": 6, "max_tokens": 128},
            "optimizer": {"learning_rate": 2e-3, "schedule": "constant"},
            "steps": 16,
            **({"evaluation": {"every": 8}} if recipe.is_judged else {}),
            "checkpoint": {"every": 4},
            "trackers": [],
            **sections,
        }

    def gate(self, call: int) -> Gate:
        """A gate before call number `call` of the divergence, from 1; to be made before the job starts."""
        gates = self._directory / "gates"
        divergence = self._tree["objective"]["divergence"]
        if divergence["name"] != "custom":
            own = {key: value for key, value in divergence.items() if key != "name"}
            params = {"gates": str(gates), "name": divergence["name"], "params": own}
            custom = {"name": "custom", "target": "tests.system.gate:divergence", "params": params}
            self._tree["objective"] = {**self._tree["objective"], "divergence": custom}
        return Gate(gates, call)

    def write(self) -> Path:
        """Its configuration, for somebody else to start."""
        self.config.write_text(yaml.safe_dump(self._tree), encoding="utf-8")
        return self.config

    def start(self, *overrides: str) -> Process:
        """Start it as one rank."""
        return self._start(sys.executable, "-m", "kdmesh_trainer", overrides=overrides)

    def start_ranks(self, ranks: int, *overrides: str) -> Process:
        """Start it by the command line, on so many ranks."""
        return self._start(KDMESH, "train", overrides=(f"ranks={ranks}", *overrides))

    def precompute(self, *overrides: str) -> Process:
        """Have its teachers keep its rows."""
        return self._start(KDMESH, "precompute", overrides=overrides)

    def start_torchrun(self, ranks: int) -> Process:
        """Start it under torchrun, on so many ranks."""
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        return self._start(torchrun, "--standalone", f"--nproc-per-node={ranks}", "-m", "kdmesh_trainer")

    def start_node(self, node: int, *, nodes: int, ranks: int, port: int) -> Process:
        """Start one node of several as a pod of a cluster does; all of them are this machine."""
        place = {"PET_NNODES": nodes, "PET_NODE_RANK": node, "PET_NPROC_PER_NODE": ranks, "PET_MASTER_PORT": port}
        environment = {key: str(value) for key, value in place.items()}
        environment |= {"PET_MASTER_ADDR": "127.0.0.1", "KDMESH_EXIT_WHEN_STOPPED": "75", "GLOO_SOCKET_IFNAME": "lo"}
        return self._start(KDMESH, "train", name=f"node-{node}", **environment)

    def lines(self) -> list[dict[str, Any]]:
        """What its record says so far."""
        return lines(self.output)

    def record(self) -> list[dict[str, Any]]:
        """Every figure of every step and evaluation that must not depend on what happened around the job."""
        return record(self.output)

    def steps(self) -> list[dict[str, Any]]:
        """The record's lines of steps, whole."""
        return [line for line in self.lines() if line["kind"] == "step"]

    def _start(
        self, *command: str, overrides: tuple[str, ...] = (), name: str = "trainer", **environment: str
    ) -> Process:
        self.write()
        sets = [argument for override in overrides for argument in ("--set", override)]
        return self._processes.start(name, self._directory, *command, str(self.config), *sets, **environment)
