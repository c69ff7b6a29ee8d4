"""A release of the chart on a node of the tests, made as the old Kubernetes there takes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.node import image
from tests.node.api_server import NAMESPACE
from tools.helm_chart import render

_PATIENCE = "5m"
# What 1.20 does not have, and what it has instead; each stands there once.
_OLDER = {
    "Chart.yaml": (('kubeVersion: ">=1.27.0-0"\n', ""),),
    "templates/availability.yaml": (
        ("apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n"),
        ("  unhealthyPodEvictionPolicy: AlwaysAllow\n", ""),
    ),
}
_REPOSITORY, _, _TAG = image.TEACHER.partition(":")

# A teacher without a model, that ends and starts as quickly as the chart lets it.
SMALL: Mapping[str, Any] = {
    "images": {"registry": "", "tag": _TAG, "teacher": {"repository": _REPOSITORY}},
    "teacher": {
        "replicas": 2,
        "config": {
            "engine": {"kind": "fake"},
            "slab": {"slots": 4, "slot_mib": 1},
            "server": {"drain_s": 20},
        },
        "gpus": {"perNode": 0},
        "shmSize": "",
        "startupMinutes": 3,
        "preStopSeconds": 3,
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}},
    },
    "auth": {"allowAnonymous": True},
}


class Release:
    """One of a name. Every method fails with what helm says."""

    def __init__(self, helm: render.Helm, name: str, directory: Path, kubeconfig: Path) -> None:
        """`directory` is for its chart and values."""
        self.name = name
        self.teacher = f"{name}-teacher"
        self.chart = _older_chart(directory / "chart")
        self._values = directory / "values.yaml"
        self._binary = render.ROOT / ".cache" / "kubernetes-tools" / helm
        self._env = {**os.environ, "KUBECONFIG": str(kubeconfig), "HOME": str(directory)}

    def install(self, values: Mapping[str, Any]) -> None:
        """And wait until all is ready."""
        self._run("install", self.name, str(self.chart), *self._with(values), "--wait", f"--timeout={_PATIENCE}")

    def upgrade(self, values: Mapping[str, Any], *, waits: bool = True) -> None:
        """To other values."""
        wait = ("--wait", f"--timeout={_PATIENCE}") if waits else ()
        self._run("upgrade", self.name, str(self.chart), *self._with(values), *wait)

    def roll_back(self, revision: int) -> None:
        """And wait until all is ready."""
        self._run("rollback", self.name, str(revision), "--wait", f"--timeout={_PATIENCE}")

    def test(self) -> None:
        """The chart's own."""
        self._run("test", self.name, f"--timeout={_PATIENCE}")

    def history(self) -> list[str]:
        """How it stands with each revision, the first one first."""
        revisions = json.loads(self._run("history", self.name, "--output=json"))
        return [one["status"] for one in revisions]

    def uninstall(self) -> None:
        """Its pods may still be ending."""
        self._run("uninstall", self.name)

    def _with(self, values: Mapping[str, Any]) -> tuple[str, str]:
        self._values.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
        return ("--values", str(self._values))

    def _run(self, *arguments: str) -> str:
        command = [str(self._binary), "--namespace", NAMESPACE, *arguments]
        done = subprocess.run(command, env=self._env, capture_output=True, text=True)
        assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stderr}"
        return done.stdout


def teacher(values: Mapping[str, Any] = SMALL, **changed: Any) -> dict[str, Any]:
    """Values with other ones of the teacher."""
    return {**values, "teacher": {**values["teacher"], **changed}}


def _older_chart(into: Path) -> Path:
    shutil.copytree(render.CHART, into)
    for name, changes in _OLDER.items():
        text = (into / name).read_text("utf-8")
        for new, old in changes:
            assert text.count(new) == 1, f"{name}: {new!r}"
            text = text.replace(new, old)
        (into / name).write_text(text, encoding="utf-8")
    return into
