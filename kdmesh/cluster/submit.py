"""Creates the objects of a training job, all or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdmesh.cluster.client import Cluster
from kdmesh.cluster.jobs import find_pods
from kdmesh.cluster.kinds import CLAIM, JOB, JOB_SET, KINDS, TRAIN_JOB, TRAINING
from kdmesh.cluster.manifests import Manifests
from kdmesh.cluster.plan import JobKind
from kdmesh.cluster.refusals import AlreadyExists
from kdmesh.errors import ClusterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """What `submit` did."""

    kind: str
    name: str
    namespace: str
    continued_claim: str | None  # that was there already, so that what lies in it is continued


def choose_kind(cluster: Cluster, *, nodes: int) -> JobKind:
    """A plain Job for one node, else the ablest kind that the cluster has. Raises ClusterError where it has none."""
    if nodes == 1:
        return "Job"
    if cluster.serves(TRAIN_JOB):
        return "TrainJob"
    if cluster.serves(JOB_SET):
        return "JobSet"
    raise ClusterError(
        f"{nodes} nodes need {JOB_SET.project} or {TRAIN_JOB.project}, and the cluster at {cluster.server} has "
        "neither: have one installed, or take --nodes 1"
    )


def submit(cluster: Cluster, wanted: Manifests) -> Submitted:
    """Create everything. What was made is removed again when a later part is refused, but for the claim.

    Raises:
        ClusterError: a part is refused, or there is a job of that name already.
    """
    metadata = wanted.job["metadata"]
    _refuse_taken(cluster, metadata["name"])
    continued = None if wanted.claim is None else _create_claim(cluster, wanted.claim)
    made: list[dict[str, Any]] = []
    try:
        for manifest in wanted.owned:
            cluster.create(manifest)
            made.append(manifest)
        job = cluster.create(wanted.job)
        made.append(wanted.job)
        for manifest in wanted.owned:
            owners = {"metadata": {"ownerReferences": [_owner(job)]}}
            cluster.patch(KINDS[manifest["kind"]], manifest["metadata"]["name"], owners)
    except BaseException:
        for manifest in reversed(made):
            cluster.delete(KINDS[manifest["kind"]], manifest["metadata"]["name"])
        raise
    return Submitted(
        kind=wanted.job["kind"], name=metadata["name"], namespace=cluster.namespace, continued_claim=continued
    )


def _refuse_taken(cluster: Cluster, name: str) -> None:
    """A name stands for one job, of whatever kind."""
    for kind in TRAINING:
        if (kind is JOB or cluster.serves(kind)) and cluster.get(kind, name) is not None:
            raise AlreadyExists(
                f"there is a {kind.name} {name} in namespace {cluster.namespace} already: end it with "
                f"`kdmesh cancel {name}`, or take another --name"
            )
    if ending := [pod.name for pod in find_pods(cluster, name) if not pod.is_over]:
        raise AlreadyExists(
            f"pods of an earlier job {name} in namespace {cluster.namespace} still end: "
            f"{', '.join(ending)}; `kdmesh cancel {name} --wait` returns when they have"
        )


def _create_claim(cluster: Cluster, claim: dict[str, Any]) -> str | None:
    """Its name, where it is there already. Raises ClusterError where not all nodes could mount that one."""
    try:
        cluster.create(claim)
    except AlreadyExists:
        name: str = claim["metadata"]["name"]
        found = cluster.get(CLAIM, name) or claim  # the second: it went meanwhile
        wanted, modes = claim["spec"]["accessModes"], found["spec"]["accessModes"]
        if "ReadWriteMany" in wanted and "ReadWriteMany" not in modes:
            raise ClusterError(
                f"the claim {name} in namespace {cluster.namespace} is {', '.join(modes)}, which one machine mounts, "
                "and the job has several nodes: take --nodes 1, another --name, or a --claim that is ReadWriteMany"
            ) from None
        return name
    return None


def _owner(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": job["apiVersion"],
        "kind": job["kind"],
        "name": job["metadata"]["name"],
        "uid": job["metadata"]["uid"],
        "controller": True,
    }
