"""Jobs sent to a cluster, looked at and ended, through the real client and a server that checks what it is given."""

from __future__ import annotations

import json
import pwd
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from click.testing import CliRunner, Result

from kdmesh.cluster.client import Cluster
from kdmesh.cluster.logs import followed
from kdmesh.commands import cli
from tests.support.cluster_schemas import CRDS
from tests.support.fake_cluster import JOB_SETS, TRAINER, FakeCluster, fake_cluster, write_kubeconfig

MOUNTS = ("--volume", "models:/models", "--volume", "data:/data", "--secret", "teacher-token:/secrets/teacher")
SUBMIT = ("submit", "train.yaml", "--image", "registry.example/kdmesh-trainer:1", *MOUNTS)


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.main, arguments)
    assert "Traceback" not in result.output
    assert result.exit_code == code, result.output or result.exception
    return result


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trainer's configuration in the current directory, for servers and files of a cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    access = {"token_file": "/secrets/teacher/token", "plaintext_token": True}
    tree = {
        "output": "runs/my-student",
        "steps": 10,
        "student": {"model": "/models/student"},
        "teacher": {"addresses": ["teacher.ml:50051"], "access": access},
        "data": {"train": {"format": "chat", "path": "/data/train.jsonl"}},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return tmp_path


@pytest.fixture
def cluster(here: Path) -> Iterator[FakeCluster]:
    with fake_cluster(here) as running:
        yield running


def pod(job: str, node: int, phase: str, *, attempt: str = "a", **status: Any) -> dict[str, Any]:
    """As the cluster's controllers make one."""
    return {
        "metadata": {
            "name": f"{job}-node-0-{node}-{attempt}",
            "labels": {"kdmesh.dev/job": job},
            "annotations": {"batch.kubernetes.io/job-completion-index": str(node)},
        },
        "spec": {"nodeName": f"machine-{node}"},
        "status": {"phase": phase, **status},
    }


def ended(code: int, message: str) -> Mapping[str, Any]:
    state = {"terminated": {"exitCode": code, "reason": "Error", "message": message}}
    return {"containerStatuses": [{"name": "node", "state": state}]}


# Sending


def test_one_node_is_a_job_with_its_claim_and_its_configuration(cluster: FakeCluster) -> None:
    said = run(*SUBMIT, "--gpus", "2", "--set", "steps=20").output
    assert said.splitlines() == [
        "Job my-student is in namespace ml",
        "Watch it: kdmesh logs -f my-student",
    ]
    job, config = cluster.get("jobs", "my-student"), cluster.get("configmaps", "my-student-config")
    assert yaml.safe_load(config["data"]["train.yaml"])["steps"] == 20
    (owner,) = config["metadata"]["ownerReferences"]
    assert owner["uid"] == job["metadata"]["uid"]
    claim = cluster.get("persistentvolumeclaims", "my-student-output")
    assert "ownerReferences" not in claim["metadata"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


@pytest.mark.parametrize(
    ("served", "kind", "plural"),
    [({**JOB_SETS, **TRAINER}, "TrainJob", "trainjobs"), (JOB_SETS, "JobSet", "jobsets")],
    ids=["trainer", "jobset"],
)
def test_several_nodes_are_the_ablest_kind_that_the_cluster_has(
    here: Path, served: Mapping[str, list[str]], kind: str, plural: str
) -> None:
    with fake_cluster(here, served=served) as cluster:
        said = run(*SUBMIT, "--nodes", "2", "--gpus", "8", "--queue", "research", "--on", "here").output
        assert said.startswith(f"{kind} my-student is in namespace ml\n")
        assert said.endswith("kdmesh logs -f my-student --on here\n")
        labels = cluster.get(plural, "my-student")["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] == "research"
        if kind == "TrainJob":
            (owner,) = cluster.get("trainingruntimes", "my-student")["metadata"]["ownerReferences"]
            assert owner["kind"] == "TrainJob"


def test_several_nodes_need_what_joins_them(here: Path) -> None:
    with fake_cluster(here, served={}) as cluster:
        said = run(*SUBMIT, "--nodes", "2", code=2).output
        assert "2 nodes need JobSet (https://jobset.sigs.k8s.io) or Kubeflow Trainer" in said
        said = run(*SUBMIT, "--nodes", "2", "--kind", "JobSet", code=2).output
        assert "the cluster has no JobSet; JobSet (https://jobset.sigs.k8s.io) is not installed there" in said
        assert cluster.names("configmaps") == []


def test_what_a_bad_configuration_says_is_said_before_anybody_is_asked(cluster: FakeCluster) -> None:
    said = run(*SUBMIT, "--nodes", "2", "--set", "student.model=models/student", "--set", "steps=0", code=2).output
    assert "steps: " in said
    said = run(*SUBMIT, "--nodes", "2", "--set", "student.model=models/student", code=2).output
    assert "student.model: models/student would lie on the claim my-student-output, which is empty at first" in said
    assert cluster.requests == []


def test_a_dry_run_prints_what_would_be_sent_and_sends_nothing(cluster: FakeCluster) -> None:
    printed = list(yaml.safe_load_all(run(*SUBMIT, "--nodes", "2", "--dry-run").output))
    assert [one["kind"] for one in printed] == ["PersistentVolumeClaim", "ConfigMap", "TrainingRuntime", "TrainJob"]
    assert all(method == "GET" for method, _ in cluster.requests)
    printed = list(yaml.safe_load_all(run(*SUBMIT, "--nodes", "2", "--dry-run", "--kind", "JobSet").output))
    assert printed[-1]["kind"] == "JobSet"


def test_what_a_dry_run_prints_is_the_same_to_a_reader_of_yaml_1_2(here: Path) -> None:
    assert "value: '1e-5'" in run(*SUBMIT, "--dry-run", "--env", "RATE=1e-5").output


def test_a_dry_run_of_a_known_kind_needs_no_cluster(here: Path) -> None:
    assert yaml.safe_load_all(run(*SUBMIT, "--dry-run").output)


def test_a_claim_that_is_there_is_continued(cluster: FakeCluster) -> None:
    run(*SUBMIT)
    run("cancel", "my-student")
    said = run(*SUBMIT).output
    assert "the claim my-student-output is there already, and is continued" in said


def test_a_claim_that_one_machine_can_mount_is_not_continued_on_several(cluster: FakeCluster) -> None:
    run(*SUBMIT)
    run("cancel", "my-student")
    said = run(*SUBMIT, "--nodes", "2", code=2).output
    assert "the claim my-student-output in namespace ml is ReadWriteOnce, which one machine mounts" in said
    assert [cluster.names(plural) for plural in ("trainjobs", "trainingruntimes", "configmaps")] == [[], [], []]
    run(*SUBMIT)
    run("cancel", "my-student")
    cluster.remove("persistentvolumeclaims", "my-student-output")
    run(*SUBMIT, "--nodes", "2")
    run("cancel", "my-student")
    run(*SUBMIT)


def test_a_name_stands_for_one_job(cluster: FakeCluster) -> None:
    run(*SUBMIT)
    said = run(*SUBMIT, "--nodes", "2", code=2).output
    assert "there is a Job my-student in namespace ml already: end it with `kdmesh cancel my-student`" in said
    run(*SUBMIT, "--name", "another")
    assert cluster.names("jobs") == ["another", "my-student"]


# What the cluster refuses


def test_a_quota_is_named_and_nothing_is_left(cluster: FakeCluster) -> None:
    cluster.quotas["jobs"] = "team, requested: count/jobs.batch=1, used: count/jobs.batch=4, limited: 4"
    said = run(*SUBMIT, code=2).output
    assert "cannot create Job my-student in namespace ml: the namespace's quota is used up: team, requested" in said
    assert cluster.names("configmaps") == []
    assert cluster.names("persistentvolumeclaims") == ["my-student-output"]


@pytest.mark.parametrize("plural", ["jobs", "configmaps", "persistentvolumeclaims"])
def test_what_the_account_may_not_is_named_and_nothing_is_left(cluster: FakeCluster, plural: str) -> None:
    cluster.forbidden.add(("create", plural))
    said = run(*SUBMIT, code=2).output
    assert f'your account may not: {plural} is forbidden: User "ann" cannot create resource "{plural}"' in said
    assert (cluster.names("jobs"), cluster.names("configmaps")) == ([], [])


def test_an_owner_that_cannot_be_set_leaves_nothing(cluster: FakeCluster) -> None:
    cluster.forbidden.add(("patch", "configmaps"))
    assert "cannot change ConfigMap my-student-config" in run(*SUBMIT, code=2).output
    assert (cluster.names("jobs"), cluster.names("configmaps")) == ([], [])


def test_a_namespace_that_is_not_there_is_named(cluster: FakeCluster) -> None:
    said = run(*SUBMIT, "--namespace", "nowhere", code=2).output
    assert "in namespace nowhere: there is no such namespace" in said


@pytest.mark.skipif(not CRDS.is_dir(), reason=f"no definitions of custom resources in {CRDS}")
def test_what_the_cluster_finds_wrong_is_told_with_its_place(cluster: FakeCluster) -> None:
    said = run(*SUBMIT, "--kind", "JobSet", "--storage-class", "fast-disk", "--nodes", "3", code=0)
    assert said.output
    thing = cluster.get("jobsets", "my-student") | {"metadata": {"name": "other"}}
    thing["spec"]["failurePolicy"]["maxRestart"] = 1
    opened = Cluster("here")
    with pytest.raises(Exception, match=r"finds it wrong: spec.failurePolicy: Additional .*'maxRestart'"):
        opened.create(thing)
    opened.close()


def test_a_context_that_is_not_there_is_told_with_those_that_are(cluster: FakeCluster) -> None:
    assert "has no context 'production'; it has here, other" in run("jobs", "--on", "production", code=2).output
    assert run("jobs", "--on", "other").output == "There is no job in namespace default.\n"


def test_without_a_kubeconfig_it_is_said_where_it_should_be(here: Path) -> None:
    assert f"there is no kubeconfig {here / 'kubeconfig'}" in run("jobs", code=2).output


def test_a_user_without_a_home_is_told_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(number: int) -> NoReturn:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "KUBECONFIG"):
        monkeypatch.delenv(name)
    assert "there is no kubeconfig ~/.kube/config" in run("jobs", code=2).output


CLUSTER = "{server: 'https://127.0.0.1:9', certificate-authority-data: abc}"
CONTEXT = f"""
current-context: here
contexts: [{{name: here, context: {{cluster: c, user: ann}}}}]
clusters: [{{name: c, cluster: {CLUSTER}}}]
users: [{{name: ann, user: {{}}}}]
"""


@pytest.mark.parametrize("text", ["clusters: [", "- a list", CONTEXT])
def test_a_damaged_kubeconfig_is_named(here: Path, text: str) -> None:
    (here / "kubeconfig").write_text(text)
    assert f"the cluster cannot be reached as {here / 'kubeconfig'} says" in run("jobs", code=2).output


def test_a_cluster_that_does_not_answer_is_named(here: Path) -> None:
    write_kubeconfig(here / "kubeconfig", "http://127.0.0.1:9")
    assert "the cluster at http://127.0.0.1:9 does not answer" in run("jobs", code=2).output


def test_an_unknown_account_is_told_to_log_in(cluster: FakeCluster, here: Path) -> None:
    write_kubeconfig(here / "kubeconfig", cluster.address, token="another")
    assert "the cluster does not know who you are; log in to it again" in run("jobs", code=2).output


# Looking


def test_jobs_are_listed_with_their_states_the_newest_first(cluster: FakeCluster) -> None:
    for name, nodes in (("one", 1), ("two", 2), ("three", 1), ("four", 1)):
        run(*SUBMIT, "--name", name, "--nodes", str(nodes), "--gpus", "2", "--queue", "research")
    cluster.put("jobs", {"metadata": {"name": "stranger", "labels": {}}, "spec": {}})
    cluster.set_status("jobs", "one", {"ready": 1, "active": 1, "failed": 2})
    cluster.set_status(
        "trainjobs", "two", {"conditions": [{"type": "Suspended", "status": "True", "reason": "Queued"}]}
    )
    cluster.set_status("jobs", "three", {"conditions": [{"type": "Complete", "status": "True"}]})
    failed = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "exit code 2"}
    cluster.set_status("jobs", "four", {"conditions": [failed]})
    jobs = {job["name"]: job for job in json.loads(run("jobs", "--json").output)}
    assert {name: job["state"] for name, job in jobs.items()} == {
        "one": "running",
        "two": "queued",
        "three": "finished",
        "four": "failed",
    }
    assert jobs["four"]["reason"] == "exit code 2"
    assert (jobs["one"]["restarts"], jobs["two"]["restarts"]) == (2, None)
    table = run("jobs").output
    assert [line.split()[0] for line in table.splitlines()[:1]] == ["name"]
    assert "two TrainJob queued 2 4 - research" in " ".join(table.split())
    assert "namespace" in run("jobs", "--all-namespaces", "--on", "other").output


def test_a_job_is_described_with_its_pods_and_what_happened(cluster: FakeCluster) -> None:
    run(*SUBMIT, "--kind", "JobSet", "--nodes", "2", "--gpus", "8")
    condition = {"type": "StartupPolicyInProgress", "status": "True", "message": "waiting", "reason": "R"}
    cluster.set_status("jobsets", "my-student", {"restarts": 1, "conditions": [condition]})
    cluster.put("pods", pod("my-student", 0, "Failed", **ended(2, "log\ndata.train.path: there is no file")))
    scheduled = {"type": "PodScheduled", "status": "False", "message": "0/4 nodes: 4 Insufficient nvidia.com/gpu."}
    cluster.put("pods", pod("my-student", 1, "Pending", conditions=[scheduled]))
    about = {"kind": "Pod", "name": "my-student-node-0-1-a"}
    message = "unmounted volumes=[output], unattached volumes=[/work]"
    event = {"involvedObject": about, "reason": "FailedMount", "message": message, "type": "Warning", "count": 3}
    cluster.put("events", {"metadata": {"name": "e1"}, "lastTimestamp": "2026-01-01T00:00:00Z", **event})
    other = {**event, "involvedObject": {"kind": "Pod", "name": "my-student-2-node-0-1"}}
    cluster.put("events", {"metadata": {"name": "e2"}, "lastTimestamp": "2026-01-01T00:00:00Z", **other})
    said = run("describe", "my-student").output
    for words in (
        "JobSet my-student in namespace ml: starting",
        "2 nodes of 8 GPUs",
        "output: /work/runs/my-student on the claim my-student-output",
        "restarts: 1",
        "StartupPolicyInProgress: waiting",
        "exit code 2: data.train.path: there is no file",
        "no machine for it: 0/4 nodes: 4 Insufficient nvidia.com/gpu.",
        f"WARNING FailedMount (3 times)  Pod my-student-node-0-1-a: {message}",
    ):
        assert words in said
    assert "my-student-2" not in said
    told = json.loads(run("describe", "my-student", "--json").output)
    assert [one["machine"] for one in told["pods"]] == ["machine-0", "machine-1"]
    assert len(told["events"]) == 1


def test_a_job_of_somebody_else_is_left_alone(cluster: FakeCluster) -> None:
    cluster.put("jobs", {"metadata": {"name": "stranger", "labels": {}}, "spec": {}})
    for command in ("cancel", "describe"):
        assert "was not made by kdmesh submit" in run(command, "stranger", code=2).output
    assert cluster.names("jobs") == ["stranger"]


# Logs


def test_a_node_s_log_is_printed(cluster: FakeCluster) -> None:
    run(*SUBMIT, "--nodes", "2")
    said = run("logs", "my-student", code=2).output
    assert "node 0 of my-student has not said anything: the job is starting; it has no pod" in said
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    cluster.put("pods", pod("my-student", 0, "Pending", containerStatuses=[{"name": "node", "state": waiting}]))
    assert "ImagePullBackOff: no such image" in run("logs", "my-student", code=2).output
    for node in (0, 1):
        cluster.put("pods", pod("my-student", node, "Running"))
        cluster.say(f"my-student-node-0-{node}-a", *(f"node {node} line {line}" for line in range(3)))
    assert run("logs", "my-student").output == "node 0 line 0\nnode 0 line 1\nnode 0 line 2\n"
    assert run("logs", "my-student", "--node", "1", "--tail", "1").output == "node 1 line 2\n"


def test_a_log_is_followed_over_a_restart_until_the_job_is_over(cluster: FakeCluster) -> None:
    run(*SUBMIT, "--kind", "JobSet", "--nodes", "2")
    told: list[str] = []
    is_told = threading.Condition()
    opened = Cluster("here")

    def follow() -> None:
        for line in followed(opened, "my-student", node=0, tail=None, warn=pytest.fail):
            with is_told:
                told.append(line)
                is_told.notify_all()

    def until(line: str) -> None:
        with is_told:
            assert is_told.wait_for(lambda: line in told, timeout=20), told

    reader = threading.Thread(target=follow)
    reader.start()
    cluster.put("pods", pod("my-student", 0, "Running"))
    cluster.say("my-student-node-0-0-a", "first attempt")
    until("first attempt")
    cluster.put("pods", pod("my-student", 0, "Failed", **ended(75, "stopped")))
    cluster.put("pods", pod("my-student", 0, "Running", attempt="b"))
    cluster.say("my-student-node-0-0-b", "second attempt")
    until("second attempt")
    cluster.set_status("jobsets", "my-student", {"conditions": [{"type": "Completed", "status": "True"}]})
    cluster.put("pods", pod("my-student", 0, "Succeeded", attempt="b"))
    reader.join(timeout=20)
    assert not reader.is_alive()
    assert told == ["first attempt", "second attempt"]
    opened.close()


@pytest.mark.parametrize("phase", ["Failed", "Running"])
def test_a_log_that_went_with_its_machine_does_not_end_following(cluster: FakeCluster, phase: str) -> None:
    run(*SUBMIT)
    cluster.put("pods", pod("my-student", 0, phase))
    cluster.unreadable["my-student-node-0-0-a"] = "dial tcp 10.0.0.7:10250: connect: no route to host"
    warnings: list[str] = []

    def replace(warning: str) -> None:
        warnings.append(warning)
        cluster.put("pods", pod("my-student", 0, "Failed"))
        cluster.put("pods", pod("my-student", 0, "Succeeded", attempt="b"))
        cluster.say("my-student-node-0-0-b", "second attempt")
        cluster.set_status("jobs", "my-student", {"conditions": [{"type": "Complete", "status": "True"}]})

    opened = Cluster("here")
    assert list(followed(opened, "my-student", node=0, tail=None, warn=replace)) == ["second attempt"]
    opened.close()
    assert [warning.rpartition(": ")[2] for warning in warnings] == ["no route to host"]


def test_who_may_not_read_logs_is_told_and_does_not_wait(cluster: FakeCluster) -> None:
    run(*SUBMIT)
    cluster.put("pods", pod("my-student", 0, "Running"))
    cluster.forbidden.add(("get", "pods/log"))
    assert "your account may not" in run("logs", "-f", "my-student", code=2).output


@pytest.mark.parametrize(("tail", "first"), [(None, ["one", "two"]), (1, ["two"])])
def test_what_follows_in_a_new_file_of_the_log_is_told(
    cluster: FakeCluster, tail: int | None, first: list[str]
) -> None:
    run(*SUBMIT)
    cluster.put("pods", pod("my-student", 0, "Running"))
    name = "my-student-node-0-0-a"
    cluster.say(name, "one", "two")
    opened = Cluster("here")
    said = followed(opened, "my-student", node=0, tail=tail, warn=pytest.fail)
    assert [next(said) for _ in first] == first
    cluster.rotate(name)
    cluster.logs[name].append("what the machine says has no time")
    cluster.say(name, "three")
    assert [next(said), next(said)] == ["what the machine says has no time", "three"]
    cluster.say(name, "four")
    assert next(said) == "four"
    cluster.set_status("jobs", "my-student", {"conditions": [{"type": "Complete", "status": "True"}]})
    cluster.put("pods", pod("my-student", 0, "Succeeded"))
    assert list(said) == []
    opened.close()


def test_following_a_job_that_is_gone_ends(cluster: FakeCluster) -> None:
    assert "there is no job gone in namespace ml" in run("logs", "-f", "gone", code=2).output


# Ending


def test_a_cancelled_job_is_gone_with_its_parts_and_its_claim_stays(cluster: FakeCluster) -> None:
    run(*SUBMIT, "--nodes", "2")
    said = run("cancel", "my-student").output
    assert said == "TrainJob my-student ends; /work/runs/my-student on the claim my-student-output stays.\n"
    assert [cluster.names(plural) for plural in ("trainjobs", "trainingruntimes", "configmaps")] == [[], [], []]
    assert cluster.names("persistentvolumeclaims") == ["my-student-output"]
    assert "there is no job my-student in namespace ml" in run("cancel", "my-student", code=2).output


def test_what_an_interrupted_submission_left_is_removed(cluster: FakeCluster) -> None:
    run(*SUBMIT)
    job = cluster.get("jobs", "my-student")
    del cluster.get("configmaps", "my-student-config")["metadata"]["ownerReferences"]
    cluster.remove("jobs", job["metadata"]["name"])
    assert "ConfigMap my-student-config in namespace ml: it exists already" in run(*SUBMIT, code=2).output
    assert run("cancel", "my-student").output == "What was left of my-student ends.\n"
    run(*SUBMIT)


def test_cancel_waits_until_no_pod_runs(cluster: FakeCluster) -> None:
    run(*SUBMIT)
    cluster.put("pods", pod("my-student", 0, "Running"))
    asked_before = cluster.num_asked("GET", "/pods")

    def end() -> None:
        deadline_s = time.monotonic() + 20
        while cluster.num_asked("GET", "/pods") <= asked_before and time.monotonic() < deadline_s:
            with cluster.changed:
                cluster.changed.wait(0.02)
        cluster.remove("pods", "my-student-node-0-0-a")

    ending = threading.Thread(target=end)
    ending.start()
    assert "Job my-student has ended" in run("cancel", "my-student", "--wait").output
    ending.join()
    assert cluster.names("pods") == []


def test_a_job_does_not_begin_while_the_last_one_of_its_name_still_writes(cluster: FakeCluster) -> None:
    run(*SUBMIT)
    cluster.put("pods", pod("my-student", 0, "Running"))
    run("cancel", "my-student")
    said = run(*SUBMIT, code=2).output
    assert "pods of an earlier job my-student in namespace ml still end: my-student-node-0-0-a" in said
    assert run("cancel", "my-student").output == "What was left of my-student ends.\n"
    cluster.put("pods", pod("my-student", 0, "Failed"))
    run(*SUBMIT)
