"""Training jobs of `kdmesh submit` on a node of the tests, made as the old Kubernetes there takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from kdmesh.cluster.pods import INDEX_ANNOTATION, JOB_LABEL
from kdmesh.commands import cli
from tests.node import image
from tests.node.api_server import NAMESPACE, ApiServer, Object
from tests.node.pods import until
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import write_chats
from tests.system import training

MATERIALS = "materials"
"""Claim with the directories teacher and student, and train.jsonl."""


class Training:
    """The jobs of one namespace. Needs KUBECONFIG in the environment."""

    def __init__(self, server: ApiServer, directory: Path) -> None:
        """Make the materials."""
        directory.mkdir()
        self._server = server
        self._directory = directory
        made = directory / MATERIALS
        made.mkdir()
        models = TinyModels(directory / "models")
        models.path("qwen3", seed=2, hidden_size=48, vocab_size=336).rename(made / "teacher")
        models.path("qwen3", seed=1).rename(made / "student")
        write_chats(made / "train.jsonl", 30, seed=1)
        for path in (made, *made.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        self._volume(MATERIALS, made)
        claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        metadata = {"name": MATERIALS, "namespace": NAMESPACE}
        server.send({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": claim})

    def prepare(self, name: str) -> Path:
        """A volume for what the job of this name writes: where it lies on this machine."""
        claim = self._directory / f"{name}-output"
        claim.mkdir()
        claim.chmod(0o777)  # as a provisioner of volumes that obey `fsGroup` would
        self._volume(claim.name, claim)
        return claim / "runs" / name

    def submit(self, name: str, *more: str, **sections: Any) -> None:
        """A job of one node; `sections` are laid over the configuration."""
        for manifest in self._manifests(name, "Job", *more, **sections):
            if not self._server.holds(manifest):  # a claim stays when its job is gone
                self._server.send(_older(manifest))

    def submit_nodes(self, name: str, *more: str, **sections: Any) -> list[str]:
        """The names of the pods of a JobSet of two nodes, made as its controller makes them, which is not there."""
        job_set, *others = self._manifests(name, "JobSet", "--nodes", "2", *more, **sections)[::-1]
        for manifest in others:
            self._server.send(manifest)
        (replicated,) = job_set["spec"]["replicatedJobs"]
        template = replicated["template"]["spec"]["template"]
        self._server.send(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name},
                "spec": {
                    "clusterIP": "None",
                    "selector": {JOB_LABEL: name},
                    "publishNotReadyAddresses": job_set["spec"]["network"]["publishNotReadyAddresses"],
                },
            }
        )
        pods = [f"{name}-{replicated['name']}-0-{index}" for index in range(2)]
        for index, pod in enumerate(pods):
            indexed = {**template["metadata"], "annotations": {INDEX_ANNOTATION: str(index)}, "name": f"{pod}-x7k2p"}
            spec = {**template["spec"], "hostname": pod, "subdomain": name}
            self._server.send({"apiVersion": "v1", "kind": "Pod", "metadata": indexed, "spec": spec})
        return [f"{pod}-x7k2p" for pod in pods]

    def state(self, name: str) -> str:
        """By `kdmesh describe`."""
        return str(described(name)["state"])

    def until_finished(self, name: str) -> None:
        """Fails when it failed."""

        def has_finished() -> bool:
            state = self.state(name)
            assert state != "failed", described(name)
            return state == "finished"

        until(has_finished)

    def _manifests(self, name: str, kind: str, *more: str, **sections: Any) -> list[Object]:
        file = self._directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**_CONFIG, "output": f"runs/{name}", **sections}), encoding="utf-8")
        small = ("--image", image.TRAINER, "--cpus", "200m", "--memory", "2Gi", "--volume", f"{MATERIALS}:/{MATERIALS}")
        printed = run("submit", str(file), "--name", name, "--kind", kind, *small, *more, "--dry-run")
        return list(yaml.safe_load_all(printed))

    def _volume(self, claim: str, path: Path) -> None:
        self._server.send(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{NAMESPACE}-{claim}"},
                "spec": {
                    "capacity": {"storage": "100Gi"},
                    "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "claimRef": {"namespace": NAMESPACE, "name": claim},
                    "hostPath": {"path": str(path)},
                },
            }
        )


_CONFIG = {
    "steps": 400,
    "student": {"model": f"/{MATERIALS}/student", "device": "cpu"},
    "objective": {"name": "distill", "divergence": {"name": "forward_kl"}},
    "data": {"max_tokens": 96, "train": {"format": "chat", "path": f"/{MATERIALS}/train.jsonl"}},
    "batch": {"sequences": 6, "max_tokens": 128},
    "optimizer": {"learning_rate": 2e-3, "schedule": "constant"},
    "checkpoint": {"every": 100},
    "trackers": [],
}


def run(*arguments: str) -> str:
    """What `kdmesh ...` prints."""
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output or result.exception
    return result.output


def described(name: str) -> dict[str, Any]:
    """A job by `kdmesh describe`."""
    found: dict[str, Any] = json.loads(run("describe", name, "--json"))
    return found


def num_steps(output: Path) -> int:
    """That the run which writes there has on record."""
    return len([line for line in training.lines(output) if line["kind"] == "step"])


def _older(manifest: Object) -> Object:
    """1.20 has no indexed Jobs: what makes the only pod of one the first node is said for it."""
    if manifest["kind"] != "Job":
        return manifest
    metadata = manifest["spec"]["template"]["metadata"]
    return _with(manifest, metadata={**metadata, "annotations": {INDEX_ANNOTATION: "0"}})


def _with(job: Object, *, metadata: Object) -> Object:
    return {**job, "spec": {**job["spec"], "template": {**job["spec"]["template"], "metadata": metadata}}}
