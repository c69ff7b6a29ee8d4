"""What a cluster is told of a training job, held against its schemas and against what must be so of every pod."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, get_args

import pytest

from kdmesh.cluster.manifests import Manifests, manifests
from kdmesh.cluster.plan import JobKind, JobPlan, Mount, Output, Resources, SecretVariable, Taint
from kdmesh.errors import ConfigError
from tests.support.cluster_schemas import CRDS, VERSIONS, pod_templates, problems

KINDS: tuple[JobKind, ...] = get_args(JobKind)
PLAN = JobPlan(
    name="my-student",
    kind="JobSet",
    image="registry.example/kdmesh-trainer:1",
    config="steps: 10\n",
    output_path="/work/runs/my-student",
    nodes=2,
    resources=Resources(gpus=8, cpus="32", memory="256Gi", others=(("rdma/ib", "1"),)),
    output=Output(claim="my-student-output", size="1Ti", storage_class="shared"),
    retries=3,
    grace_s=600,
    user=10001,
    mounts=(
        Mount(source="models", path=PurePosixPath("/models"), kind="claim"),
        Mount(source="broker", path=PurePosixPath("/run/kdmesh"), kind="claim", is_read_only=False),
        Mount(source="teacher-token", path=PurePosixPath("/secrets/teacher"), kind="secret"),
    ),
    secrets=(SecretVariable(name="WANDB_API_KEY", secret="wandb", key="key"),),
    variables=(("NCCL_IB_HCA", "mlx5"),),
    queue="research",
    service_account="trainer",
    asks_cluster=False,
    node_labels=(("gpu", "h100"),),
    tolerated=(Taint(key="dedicated", value="research", effect="NoExecute"), Taint(key="spot")),
    pull_secret="registry",
    metrics_port=None,
)


def of(kind: JobKind, **changes: Any) -> Manifests:
    return manifests(replace(PLAN, kind=kind, nodes=1 if kind == "Job" else 2, **changes))


def only_pod(made: Manifests) -> dict[str, Any]:
    (pod,) = pod_templates(made.all())
    return pod


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_kubernetes_takes_every_object_of_its_own(kind: JobKind, version: str) -> None:
    made = of(kind)
    own = [one for one in made.all() if one["kind"] in ("Job", "ConfigMap", "PersistentVolumeClaim")]
    assert len(own) >= 2
    assert [problem for one in own for problem in problems(one, version)] == []
    assert problems(only_pod(made), version) == []


@pytest.mark.skipif(not CRDS.is_dir(), reason=f"no definitions of custom resources in {CRDS}")
@pytest.mark.parametrize("kind", ["JobSet", "TrainJob"])
def test_custom_resources_are_as_their_definitions_say(kind: JobKind) -> None:
    made = of(kind)
    custom = [one for one in made.all() if "." in one["apiVersion"].split("/")[0]]
    assert {one["kind"] for one in custom} == ({"JobSet"} if kind == "JobSet" else {"TrainingRuntime", "TrainJob"})
    assert [problem for one in custom for problem in problems(one)] == []
    custom[0]["spec"]["colour"] = "red"
    assert problems(custom[0]) != []


@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_satisfies_the_restricted_standard(kind: JobKind) -> None:
    spec = only_pod(of(kind))["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    own = container["securityContext"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert own["readOnlyRootFilesystem"] is True
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    allowed = {"configMap", "persistentVolumeClaim", "emptyDir", "secret"}
    assert {key for volume in spec["volumes"] for key in volume if key != "name"} <= allowed
    assert container["resources"]["limits"] == {"memory": "256Gi", "rdma/ib": "1", "nvidia.com/gpu": "8"}


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_ask_the_cluster_only_where_servers_are_looked_for_in_it(kind: JobKind) -> None:
    assert only_pod(of(kind))["spec"]["automountServiceAccountToken"] is False
    assert only_pod(of(kind, asks_cluster=True))["spec"]["automountServiceAccountToken"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_machines_that_are_kept_for_such_jobs_are_taken(kind: JobKind) -> None:
    named = [
        {"key": "dedicated", "operator": "Equal", "value": "research", "effect": "NoExecute"},
        {"key": "spot", "operator": "Exists"},
    ]
    of_gpus = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert only_pod(of(kind))["spec"]["tolerations"] == [of_gpus, *named]
    without = only_pod(of(kind, resources=replace(PLAN.resources, gpus=0)))["spec"]
    assert without["tolerations"] == named


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_of_a_secret_is_written_down(kind: JobKind) -> None:
    pod = only_pod(of(kind))["spec"]
    (key,) = [one for one in pod["containers"][0]["env"] if one["name"] == "WANDB_API_KEY"]
    assert key == {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}}
    (mounted,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert mounted == {"secretName": "teacher-token", "defaultMode": 0o440}


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob"])
def test_every_node_knows_its_place_and_where_the_first_one_is(kind: JobKind) -> None:
    env = {one["name"]: one for one in only_pod(of(kind))["spec"]["containers"][0]["env"]}
    assert env["PET_NNODES"]["value"] == "2"
    assert env["PET_NPROC_PER_NODE"]["value"] == "8"
    # The host name that JobSet gives to pod 0 of job 0 of its jobs `node`, in the domain of its own name.
    assert env["PET_MASTER_ADDR"]["value"] == "my-student-node-0-0.my-student"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["PET_NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"] == index


def test_a_preempted_job_costs_no_retry_and_a_refused_one_none_either() -> None:
    spec = of("Job").job["spec"]
    assert spec["backoffLimit"] == 3
    preempted, stopped, refused = spec["podFailurePolicy"]["rules"]
    assert (preempted["action"], preempted["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("Ignore", [75])
    assert (refused["action"], refused["onExitCodes"]["values"]) == ("FailJob", [2])


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob"])
def test_a_preempted_node_restarts_all_of_them_without_being_counted(kind: JobKind) -> None:
    made = of(kind)
    parts = made.job["spec"] if kind == "JobSet" else made.owned[-1]["spec"]["template"]["spec"]
    assert parts["failurePolicy"]["maxRestarts"] == 3
    (rule,) = parts["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    job = parts["replicatedJobs"][0]["template"]["spec"]
    # Nothing but a preemption or an orderly stop may have that reason, or it would be started again for ever.
    assert [sorted(one) for one in job["podFailurePolicy"]["rules"]] == [
        ["action", "onPodConditions"],
        ["action", "onExitCodes"],
    ]
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [75]
    assert job["backoffLimit"] == 0


def test_a_given_claim_is_not_made() -> None:
    made = of("Job", output=Output(claim="mine", size=None))
    assert made.claim is None
    volumes = only_pod(made)["spec"]["volumes"]
    assert {"name": "output", "persistentVolumeClaim": {"claimName": "mine"}} in volumes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "My_Student"}, "the job's name 'My_Student' must be at most 45"),
        ({"name": "s" * 46}, "choose one with --name"),
        ({"kind": "Job"}, "a Job has one node, not 2"),
        ({"resources": replace(PLAN.resources, memory="64 GB")}, "'64 GB' is no quantity of Kubernetes"),
        ({"user": 0}, "--user 0: a job runs as an ordinary user"),
        ({"mounts": (replace(PLAN.mounts[0], path=PurePosixPath("/work")),)}, "mounted at /work: /work is there"),
        ({"mounts": (replace(PLAN.mounts[0], path=PurePosixPath("/etc")),)}, "mounted at /etc: /etc/kdmesh is there"),
        ({"mounts": (replace(PLAN.mounts[0], path=PurePosixPath("models")),)}, "give an absolute path"),
        ({"mounts": (PLAN.mounts[0], PLAN.mounts[0])}, "another one is there"),
    ],
)
def test_what_cannot_be_is_refused_with_the_rule(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        replace(PLAN, **changes)
    assert words in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_have_the_port_that_the_chart_looks_for(kind: JobKind) -> None:
    for port, wanted in ((8071, {"rendezvous": 29500, "metrics": 8071}), (None, {"rendezvous": 29500})):
        (container,) = only_pod(of(kind, metrics_port=port))["spec"]["containers"]
        assert {one["name"]: one["containerPort"] for one in container["ports"]} == wanted
