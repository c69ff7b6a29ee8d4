"""What kdmesh needs of a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Iterator

from kdmesh.cluster.client import Cluster
from kdmesh.cluster.kinds import (
    CLAIM,
    CONFIG_MAP,
    ENDPOINT_SLICE,
    JOB,
    JOB_SET,
    NODE,
    POD,
    STORAGE_CLASS,
    TRAIN_JOB,
    Kind,
)
from kdmesh.doctor.finding import Finding, ok
from kdmesh.errors import ClusterError

_OLDEST = (1, 29)
_LARGEST_SKEW_S = 5.0
_GPUS = "nvidia.com/gpu"
# By group: name, the version that is asked for, and what is amiss without it.
_OPTIONAL: dict[str, tuple[str, str | None, str]] = {
    JOB_SET.group: ("JobSet", "v1alpha2", "jobs of several nodes need it, or Kubeflow Trainer"),
    TRAIN_JOB.group: ("Kubeflow Trainer", "v1alpha1", "jobs of several nodes are JobSets, without its features"),
    "kueue.x-k8s.io": (
        "Kueue",
        None,  # a job bears its label, which every version heeds, and nothing else of it
        "no queue and no gang scheduling: --queue does nothing, and two jobs can wait for each other's nodes",
    ),
    "leaderworkerset.x-k8s.io": ("LeaderWorkerSet", "v1", "a teacher cannot span nodes"),
    "keda.sh": ("KEDA", "v1alpha1", "teachers do not scale with their queue"),
    "monitoring.coreos.com": (
        "Prometheus Operator",
        "v1",
        "nobody scrapes the servers by themselves: ServiceMonitors and rules do nothing",
    ),
}
_RIGHTS = (
    ("create", JOB),
    ("create", CONFIG_MAP),
    ("patch", CONFIG_MAP),
    ("create", CLAIM),
    ("delete", JOB),
    ("list", POD),
)


def cluster_findings(cluster: Cluster) -> Iterator[Finding]:
    """Versions, rights in the namespace, GPUs, storage, clocks. Raises ClusterError when it does not answer."""
    yield _version(cluster)
    yield _clock(cluster)
    groups = cluster.groups()
    for group, (name, wanted, cost) in _OPTIONAL.items():
        yield _custom(name, group, wanted, cost, groups.get(group, ()))
    yield _several_nodes(groups)
    for verb, kind in _RIGHTS:
        yield _right(cluster, verb, kind)
    yield _gpus(cluster)
    yield _storage(cluster)
    yield _right(
        cluster, "watch", ENDPOINT_SLICE, cost="k8s:/// addresses of a job run as you are not found", verdict="worse"
    )


def _version(cluster: Cluster) -> Finding:
    version = cluster.version()
    major, minor = (int("".join(filter(str.isdigit, part))) for part in version.lstrip("v").split(".")[:2])
    if (major, minor) >= _OLDEST:
        return ok("Kubernetes", f"{version} at {cluster.server}")
    return Finding(
        name="Kubernetes",
        verdict="worse",
        found=f"{version} at {cluster.server}",
        cost="manifests are tested with the schemas of 1.29 and newer; older clusters may drop what they do not know",
        cure="a newer cluster",
    )


def _clock(cluster: Cluster) -> Finding:
    skew_s = cluster.clock_skew_s()
    found = f"{abs(skew_s):.0f} s {'behind' if skew_s < 0 else 'ahead of'} this machine's"
    if abs(skew_s) <= _LARGEST_SKEW_S:
        return ok("the cluster's clock", found)
    cost = "ages of jobs are shown wrong, and tokens may be refused"
    return Finding(name="the cluster's clock", verdict="worse", found=found, cost=cost, cure="NTP on both sides")


def _custom(name: str, group: str, wanted: str | None, cost: str, served: tuple[str, ...]) -> Finding:
    if served and (wanted is None or wanted in served):
        return ok(name, f"{group}/{wanted or served[0]}")
    found = "not installed" if not served else f"{group} in {', '.join(served)}, where {wanted} is wanted"
    return Finding(
        name=name,
        verdict="worse",
        found=found,
        cost=cost,
        cure=f"have {name} installed" if not served else f"another version of {name}",
    )


def _several_nodes(groups: dict[str, tuple[str, ...]]) -> Finding:
    joining = [kind.name for kind in (TRAIN_JOB, JOB_SET) if kind.version in groups.get(kind.group, ())]
    if joining:
        return ok("jobs of several nodes", f"as {joining[0]}")
    return Finding(
        name="jobs of several nodes",
        verdict="worse",
        found="neither JobSet nor Kubeflow Trainer",
        cost="kdmesh submit takes --nodes 1 only",
        cure="have JobSet installed",
    )


def _right(cluster: Cluster, verb: str, kind: Kind, *, cost: str = "", verdict: str = "missing") -> Finding:
    name = f"may {verb} {kind.plural}"
    if cluster.may(verb, kind):
        return ok(name, f"in namespace {cluster.namespace}")
    return Finding(
        name=name,
        verdict="missing" if verdict == "missing" else "worse",
        found=f"not in namespace {cluster.namespace}",
        cost=cost or "kdmesh submit, jobs and cancel do not work there",
        cure="another --namespace, or the chart's role of submitters (docs/kubernetes.md)",
    )


def _gpus(cluster: Cluster) -> Finding:
    try:
        nodes = cluster.find(NODE)
    except ClusterError as error:
        return Finding(name="GPUs of the cluster", verdict="unknown", found=str(error))
    counts = [int(node.get("status", {}).get("allocatable", {}).get(_GPUS, 0)) for node in nodes]
    if any(counts):
        return ok("GPUs of the cluster", f"{sum(counts)} on {sum(map(bool, counts))} of {len(counts)} machines")
    return Finding(
        name="GPUs of the cluster",
        verdict="worse",
        found=f"no machine of {len(counts)} offers {_GPUS}",
        cost="jobs with --gpus wait for ever",
        cure="the device plugin or GPU operator of the vendor; --gpu-resource where they are called otherwise",
        part="gpu",
    )


def _storage(cluster: Cluster) -> Finding:
    try:
        classes = cluster.find(STORAGE_CLASS)
    except ClusterError as error:
        return Finding(name="storage", verdict="unknown", found=str(error))
    note = "storageclass.kubernetes.io/is-default-class"
    default = [one["metadata"]["name"] for one in classes if one["metadata"].get("annotations", {}).get(note) == "true"]
    if default:
        return ok(
            "storage",
            f"{default[0]} by default, of {len(classes)} classes; jobs of several nodes need one with ReadWriteMany",
        )
    return Finding(
        name="storage",
        verdict="worse",
        found=f"{len(classes)} classes, none of them the default",
        cost="the claim of a job's output is never filled",
        cure="--storage-class, or --claim with one that is there",
    )
