"""The objects that make a training job: its claim, its configuration, and the Job, JobSet or TrainJob itself."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from kdmesh.cluster.kinds import CLAIM, CONFIG_MAP, JOB, JOB_SET, TRAIN_JOB, TRAINING_RUNTIME, Kind
from kdmesh.cluster.plan import CONFIG_FILE, REFUSED, STOPPED, JobPlan
from kdmesh.cluster.pods import CONTAINER, JOB_LABEL, LABELS, config_name, pod_template

Manifest = dict[str, Any]

MANAGED = "app.kubernetes.io/managed-by=kdmesh"
"""Selects what `kdmesh submit` made."""

NODES = "kdmesh.dev/nodes"
GPUS = "kdmesh.dev/gpus-per-node"
OUTPUT = "kdmesh.dev/output"
CLAIM_NAME = "kdmesh.dev/claim"
QUEUE = "kueue.x-k8s.io/queue-name"
_REPLICATED = "node"
_KEEP_FINISHED_S = 7 * 24 * 3600  # then the cluster removes it; what it wrote stays
_DISRUPTED = {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifests:
    """In the order in which they are created."""

    claim: Manifest | None  # None: it is there
    owned: tuple[Manifest, ...]  # by the job: they go with it
    job: Manifest

    def all(self) -> list[Manifest]:
        """Every one."""
        return [*([] if self.claim is None else [self.claim]), *self.owned, self.job]


def manifests(plan: JobPlan) -> Manifests:
    """What the cluster is told."""
    config = _manifest(plan, CONFIG_MAP, config_name(plan)) | {"data": {CONFIG_FILE: plan.config}}
    claim = None if plan.output.size is None else _claim(plan, plan.output.size)
    match plan.kind:
        case "Job":
            return Manifests(claim=claim, owned=(config,), job=_top(plan, JOB) | {"spec": _lone_job(plan)})
        case "JobSet":
            return Manifests(claim=claim, owned=(config,), job=_top(plan, JOB_SET) | {"spec": _job_set(plan)})
        case "TrainJob":
            runtime = _manifest(plan, TRAINING_RUNTIME, plan.name) | {"spec": _runtime(plan)}
            return Manifests(
                claim=claim, owned=(config, runtime), job=_top(plan, TRAIN_JOB) | {"spec": _train_job(plan)}
            )


def _manifest(plan: JobPlan, kind: Kind, name: str) -> Manifest:
    labels = {**LABELS, JOB_LABEL: plan.name, "app.kubernetes.io/managed-by": "kdmesh"}
    labels["app.kubernetes.io/version"] = version("kdmesh")
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": {"name": name, "labels": labels}}


def _top(plan: JobPlan, kind: Kind) -> Manifest:
    """The job itself, which says what `kdmesh jobs` and `describe` tell."""
    manifest = _manifest(plan, kind, plan.name)
    manifest["metadata"]["annotations"] = {
        NODES: str(plan.nodes),
        GPUS: str(plan.resources.gpus),
        OUTPUT: plan.output_path,
        CLAIM_NAME: plan.output.claim,
    }
    if plan.queue is not None:
        manifest["metadata"]["labels"][QUEUE] = plan.queue  # Kueue's webhook suspends it until its turn
    return manifest


def _claim(plan: JobPlan, size: str) -> Manifest:
    spec: Manifest = {
        # Of a JobSet only the first node writes, but all of them mount it.
        "accessModes": ["ReadWriteMany" if plan.nodes > 1 else "ReadWriteOnce"],
        "resources": {"requests": {"storage": size}},
    }
    if plan.output.storage_class is not None:
        spec["storageClassName"] = plan.output.storage_class
    return _manifest(plan, CLAIM, plan.output.claim) | {"spec": spec}


def _lone_job(plan: JobPlan) -> Manifest:
    """A Job replaces its one pod by itself."""
    rules = [
        {"action": "Ignore", **_DISRUPTED},
        {"action": "Ignore", **_exited(STOPPED)},
        {"action": "FailJob", **_exited(REFUSED)},
    ]
    return _job(plan, rules, backoff_limit=plan.retries, first_node="127.0.0.1") | {
        "ttlSecondsAfterFinished": _KEEP_FINISHED_S
    }


def _job_set(plan: JobPlan) -> Manifest:
    return {
        **_job_set_parts(plan, labels={}),
        "ttlSecondsAfterFinished": _KEEP_FINISHED_S,
    }


def _job_set_parts(plan: JobPlan, *, labels: dict[str, str]) -> Manifest:
    """All nodes as one Job, which is started anew as a whole: the ranks of a job need each other.

    A pod that was preempted, or whose run was stopped in good order, fails the Job with the reason PodFailurePolicy,
    and only that restarts it without counting. The Job has no retries of its own: a lone new pod would find nobody.
    """
    rules = [{"action": "FailJob", **_DISRUPTED}, {"action": "FailJob", **_exited(STOPPED)}]
    job = _job(plan, rules, backoff_limit=0, first_node=f"{plan.name}-{_REPLICATED}-0-0.{plan.name}")
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All"},
        "failurePolicy": {
            "maxRestarts": plan.retries,
            "restartStrategy": "BlockingRecreate",  # two of one node would write to the same output
            "rules": [
                {
                    "name": "preempted",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }
            ],
        },
        "replicatedJobs": [
            {"name": _REPLICATED, "replicas": 1, "template": {"metadata": {"labels": labels}, "spec": job}}
        ],
    }


def _runtime(plan: JobPlan) -> Manifest:
    """A runtime of the job's own, so that its restarts are those of a JobSet."""
    parts = _job_set_parts(plan, labels={"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"})
    return {"mlPolicy": {"numNodes": plan.nodes, "torch": {}}, "template": {"spec": parts}}


def _train_job(plan: JobPlan) -> Manifest:
    reference = {"apiGroup": TRAINING_RUNTIME.group, "kind": TRAINING_RUNTIME.name, "name": plan.name}
    return {
        "runtimeRef": reference,
        "trainer": {"numNodes": plan.nodes, "numProcPerNode": plan.resources.ranks},
    }


def _job(plan: JobPlan, rules: list[Manifest], *, backoff_limit: int, first_node: str) -> Manifest:
    return {
        "completionMode": "Indexed",
        "completions": plan.nodes,
        "parallelism": plan.nodes,
        "backoffLimit": backoff_limit,
        "podReplacementPolicy": "Failed",  # the old one has ended before the new one writes
        "podFailurePolicy": {"rules": rules},
        "template": pod_template(plan, first_node=first_node),
    }


def _exited(code: int) -> Manifest:
    return {"onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]}}
