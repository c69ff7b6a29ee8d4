"""Runs the pods of a Job as processes of this machine, and does for it what Kubernetes' controller of Jobs does.

A double: it knows one node, and of the rules for failed pods those that `kdmesh submit` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.fake_cluster import FakeCluster
from tests.system.processes import Process, Processes
from tests.system.training import KDMESH

_FIELDS = {
    "metadata.annotations['batch.kubernetes.io/job-completion-index']": "0",
    "spec.nodeName": "machine-0",
    "metadata.namespace": "ml",
}


class JobPods:
    """The pods of one Job, one after the other. Its claim is the directory `claim`, for /work."""

    def __init__(self, cluster: FakeCluster, name: str, processes: Processes, directory: Path) -> None:
        """Start nothing yet."""
        self.claim = directory / "claim"
        self.claim.mkdir(parents=True)
        self._cluster = cluster
        self._name = name
        self._processes = processes
        self._directory = directory
        self._attempts = 0

    def start(self) -> Process:
        """The next pod."""
        self._attempts += 1
        job = self._cluster.get("jobs", self._name)
        template = job["spec"]["template"]
        (container,) = template["spec"]["containers"]
        (config,) = self._cluster.get("configmaps", f"{self._name}-config")["data"].items()
        mounted = self._directory / config[0]
        mounted.write_text(config[1], encoding="utf-8")
        at = {"kdmesh": KDMESH, f"/etc/kdmesh/{config[0]}": str(mounted)}
        environment = {one["name"]: one.get("value") or _field(one) for one in container["env"]}
        process = self._processes.start(
            "pod", self.claim, *(at.get(word, word) for word in container["command"]), **environment
        )
        self._put(template, {"phase": "Running"})
        self._cluster.set_status("jobs", self._name, {"active": 1, "ready": 1})
        return process

    def end(self, process: Process) -> str:
        """Wait for a pod's end and draw the Job's conclusion: Complete, Failed, or Ignore, which means another pod."""
        code = process.exit_code()
        job = self._cluster.get("jobs", self._name)
        message = "\n".join(process.words())
        ended = {"terminated": {"exitCode": code, "message": message}}
        status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [{"name": "node", "state": ended}]}
        self._cluster.say(self._pod, *process.log.read_text(encoding="utf-8").splitlines())
        self._put(job["spec"]["template"], status)
        conclusion = _conclusion(job, code)
        if conclusion != "Ignore":
            condition = {"type": conclusion, "status": "True", "message": f"exit code {code}"}
            self._cluster.set_status("jobs", self._name, {"conditions": [condition]})
        return conclusion

    @property
    def _pod(self) -> str:
        return f"{self._name}-0-{self._attempts}"

    def _put(self, template: dict[str, Any], status: dict[str, Any]) -> None:
        self._cluster.put(
            "pods", {"metadata": {**template["metadata"], "name": self._pod}, "spec": {}, "status": status}
        )


def _field(one: dict[str, Any]) -> str:
    return _FIELDS[one["valueFrom"]["fieldRef"]["fieldPath"]]


def _conclusion(job: dict[str, Any], code: int) -> str:
    if code == 0:
        return "Complete"
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", ()):
            return "Failed" if rule["action"] == "FailJob" else "Ignore"
    raise AssertionError(f"no rule for exit code {code}")
