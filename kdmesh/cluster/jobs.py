"""Training jobs that are in a cluster: which there are, how each does, and their end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from kdmesh.cluster.client import Cluster
from kdmesh.cluster.kinds import CONFIG_MAP, JOB, JOB_SET, POD, TRAIN_JOB, TRAINING, TRAINING_RUNTIME, Kind
from kdmesh.cluster.manifests import CLAIM_NAME, GPUS, MANAGED, NODES, OUTPUT, QUEUE
from kdmesh.cluster.pods import CONTAINER, INDEX_ANNOTATION, JOB_LABEL
from kdmesh.cluster.refusals import Missing
from kdmesh.errors import ClusterError

State = Literal["queued", "suspended", "starting", "running", "finished", "failed", "ending"]

_LOOK_AGAIN_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One, as it is now."""

    name: str
    namespace: str
    kind: str
    state: State
    reason: str  # for a failure; empty otherwise
    nodes: int
    gpus_per_node: int
    restarts: int | None  # None: it does not say
    created: str  # RFC 3339
    queue: str | None
    claim: str
    output: str  # directory, as its nodes see it

    @property
    def is_over(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state in ("finished", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """One attempt of one node."""

    name: str
    node: int  # index in the job
    machine: str  # empty until there is one
    phase: str
    reason: str  # why it waits or how it ended; empty while all is well
    created: str

    @property
    def has_started(self) -> bool:
        """Whether it has a log."""
        return self.phase == "Running" or self.is_over

    @property
    def is_over(self) -> bool:
        """Whether it does nothing any more."""
        return self.phase in ("Succeeded", "Failed")


def find_jobs(cluster: Cluster, *, everywhere: bool) -> list[Job]:
    """Every job that `kdmesh submit` made and that is still there, the newest first."""
    found = [
        _job(kind, thing)
        for kind in _served(cluster)
        for thing in cluster.find(kind, labels=MANAGED, everywhere=everywhere)
    ]
    return sorted(found, key=lambda job: job.created, reverse=True)


def find_job(cluster: Cluster, name: str) -> Job:
    """One of them. Raises Missing where there is none."""
    kind, thing = _find(cluster, name)
    return _job(kind, thing)


def find_pods(cluster: Cluster, name: str) -> list[Pod]:
    """Of a job, by node; of one node the newest last."""
    pods = [_pod(thing) for thing in cluster.find(POD, labels=f"{JOB_LABEL}={name}")]
    return sorted(pods, key=lambda pod: (pod.node, pod.created))


def conditions(cluster: Cluster, name: str) -> list[str]:
    """What the cluster says of a job, a sentence each."""
    _, thing = _find(cluster, name)
    return [
        f"{said['type']}: {said.get('message') or said.get('reason', '')}".removesuffix(": ")
        for said in thing.get("status", {}).get("conditions", ())
        if said["status"] == "True"
    ]


def cancel(cluster: Cluster, name: str) -> Job | None:
    """Ask for a job's end; its nodes write a checkpoint first. The claim stays.

    Returns:
        The job as it was; None where only parts of it were left.

    Raises:
        Missing: there is nothing of that name.
    """
    job: Job | None = None
    try:
        kind, thing = _find(cluster, name)
    except Missing:
        if not _remove_parts(cluster, name) and not find_pods(cluster, name):
            raise
        return None
    job = _job(kind, thing)
    cluster.delete(kind, name)
    _remove_parts(cluster, name)
    return job


def wait_for_pods_to_end(cluster: Cluster, name: str) -> None:
    """Return when a cancelled job has no pod any more."""
    while find_pods(cluster, name):
        wait_for_pods(cluster, name)


def wait_for_pods(cluster: Cluster, name: str) -> None:
    """Return when something has become of a job's pods, or after a few seconds."""
    labels = f"{JOB_LABEL}={name}"
    _, since = cluster.snapshot(POD, labels=labels)
    watch = cluster.watch(POD, labels=labels, since=since, seconds=_LOOK_AGAIN_S)
    for _ in watch:
        break
    watch.close()


def _served(cluster: Cluster) -> Iterator[Kind]:
    yield from (kind for kind in TRAINING if kind is JOB or cluster.serves(kind))


def _find(cluster: Cluster, name: str) -> tuple[Kind, dict[str, Any]]:
    for kind in _served(cluster):
        thing = cluster.get(kind, name)
        if thing is None:
            continue
        if thing["metadata"].get("labels", {}).get("app.kubernetes.io/managed-by") != "kdmesh":
            raise ClusterError(f"the {kind.name} {name} in namespace {cluster.namespace} was not made by kdmesh submit")
        return kind, thing
    raise Missing(f"there is no job {name} in namespace {cluster.namespace}; `kdmesh jobs` lists those there are")


def _remove_parts(cluster: Cluster, name: str) -> bool:
    """What a job owns; it would go by itself, but for jobs whose submission was cut short."""
    kinds = [CONFIG_MAP, *([TRAINING_RUNTIME] if cluster.serves(TRAIN_JOB) else [])]
    labels = f"{MANAGED},{JOB_LABEL}={name}"
    parts = [(kind, thing["metadata"]["name"]) for kind in kinds for thing in cluster.find(kind, labels=labels)]
    removed = [cluster.delete(kind, part) for kind, part in parts]
    return any(removed)


def _job(kind: Kind, thing: dict[str, Any]) -> Job:
    metadata, status = thing["metadata"], thing.get("status", {})
    said = {one["type"]: one for one in status.get("conditions", ()) if one["status"] == "True"}
    notes = metadata.get("annotations", {})
    queue = metadata["labels"].get(QUEUE)
    failed = said.get("Failed", {})
    return Job(
        name=metadata["name"],
        namespace=metadata["namespace"],
        kind=kind.name,
        state=_state(metadata, status, set(said), is_queued=queue is not None),
        reason=failed.get("message") or failed.get("reason", ""),
        nodes=int(notes.get(NODES, 1)),
        gpus_per_node=int(notes.get(GPUS, 0)),
        restarts=_restarts(kind, status),
        created=metadata["creationTimestamp"],
        queue=queue,
        claim=notes.get(CLAIM_NAME, ""),
        output=notes.get(OUTPUT, ""),
    )


def _state(metadata: dict[str, Any], status: dict[str, Any], said: set[str], *, is_queued: bool) -> State:
    if said & {"Complete", "Completed"}:
        return "finished"
    if "Failed" in said:
        return "failed"
    if "deletionTimestamp" in metadata:
        return "ending"
    if "Suspended" in said:
        return "queued" if is_queued else "suspended"
    counts = [status, *status.get("replicatedJobsStatus", ()), *status.get("jobsStatus", ())]
    return "running" if any(count.get("ready") for count in counts) else "starting"


def _restarts(kind: Kind, status: dict[str, Any]) -> int | None:
    if kind is TRAIN_JOB:
        return None
    found: int = status.get("restarts" if kind is JOB_SET else "failed", 0)
    return found


def _pod(thing: dict[str, Any]) -> Pod:
    metadata, status = thing["metadata"], thing.get("status", {})
    return Pod(
        name=metadata["name"],
        node=int(metadata.get("annotations", {}).get(INDEX_ANNOTATION, 0)),
        machine=thing.get("spec", {}).get("nodeName", ""),
        phase=status.get("phase", "Pending"),
        reason=_reason(status),
        created=metadata["creationTimestamp"],
    )


def _reason(status: dict[str, Any]) -> str:
    for said in status.get("conditions", ()):
        if said["type"] == "DisruptionTarget" and said["status"] == "True":
            return f"preempted: {said.get('message') or said.get('reason', '')}"
    for container in status.get("containerStatuses", ()):
        state = container.get("state", {}) if container["name"] == CONTAINER else {}
        if waiting := state.get("waiting"):
            return ": ".join(filter(None, (waiting.get("reason"), waiting.get("message"))))
        ended = state.get("terminated", {})
        if ended.get("exitCode"):
            last = (ended.get("message") or "").strip().rpartition("\n")[2]
            return ": ".join(filter(None, (f"exit code {ended['exitCode']}", last or ended.get("reason"))))
    for said in status.get("conditions", ()):
        if said["type"] == "PodScheduled" and said["status"] == "False":
            return f"no machine for it: {said.get('message') or said.get('reason', '')}"
    return ""
