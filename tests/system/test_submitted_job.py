"""Jobs from `kdmesh submit` to their end: found servers, a preemption, a failure, and what they leave where."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kdmesh.commands import cli
from tests.support.fake_cluster import FakeCluster, fake_cluster
from tests.system.conftest import Materials
from tests.system.pods import JobPods
from tests.system.processes import Process, Processes
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

SERVICE = "k8s:///teachers.ml:grpc"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A job that is over, and what was said of it then."""

    pods: JobPods
    conclusions: list[str]  # of its pods
    sessions: list[int]  # that its teacher had of it after each of them
    last: Process
    described: dict[str, Any]  # by `kdmesh describe`
    log: str  # by `kdmesh logs -f`

    @property
    def output(self) -> Path:
        """Where the job was said to write to, on the claim."""
        return self.pods.claim / Path(self.described["output"]).relative_to("/work")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    root = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch, fake_cluster(root) as running:
        patch.setenv("KUBECONFIG", str(root / "kubeconfig"))
        yield running


@pytest.fixture(scope="module")
def teacher(
    cluster: FakeCluster, materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Teacher:
    """A server that the cluster knows as the only one of a service."""
    serving = Teacher(processes, tmp_path_factory.mktemp("teacher") / "own", materials.teacher)
    serving.start()
    serving.wait_ready()
    host, _, port = serving.address.rpartition(":")
    endpoint = {"addresses": [host], "conditions": {"ready": True}, "nodeName": "machine-0"}
    metadata = {"name": "teachers-1", "labels": {"kubernetes.io/service-name": "teachers"}}
    slice_ = {"metadata": metadata, "addressType": "IPv4", "endpoints": [endpoint]}
    cluster.put("endpointslices", {**slice_, "ports": [{"name": "grpc", "port": int(port)}]})
    return serving


def submitted(cluster: FakeCluster, processes: Processes, job: Job, materials: Materials) -> JobPods:
    name = job.config.parent.name
    held = (materials.data, materials.plain.student)
    in_image = [word for path in held for word in ("--in-image", str(path))]
    run("submit", str(job.write()), "--image", "trainer:1", "--name", name, *in_image)
    return JobPods(cluster, name, processes, job.config.parent / "pods")


def until_over(teacher: Teacher, pods: JobPods, name: str, first: Process) -> Ended:
    conclusions, sessions, process = [pods.end(first)], [num_sessions(teacher, name)], first
    while conclusions[-1] == "Ignore":
        process = pods.start()
        conclusions.append(pods.end(process))
        sessions.append(num_sessions(teacher, name))
    described, log = json.loads(run("describe", name, "--json")), run("logs", "-f", name)
    return Ended(pods=pods, conclusions=conclusions, sessions=sessions, last=process, described=described, log=log)


def num_sessions(teacher: Teacher, job: str) -> int:
    return len([one for one in teacher.get("/v1/sessions")["sessions"] if one["job"] == job])


@pytest.fixture(scope="module")
def preempted(
    cluster: FakeCluster,
    teacher: Teacher,
    materials: Materials,
    processes: Processes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Ended:
    directory = tmp_path_factory.mktemp("jobs") / "preempted"
    job = Job(processes, directory, materials.plain, SERVICE, output="runs/preempted", checkpoint={})
    gate = job.gate(20)
    pods = submitted(cluster, processes, job, materials)
    process = pods.start()
    process.until(gate.is_reached)
    assert num_sessions(teacher, "preempted") == 1
    process.signal(signal.SIGTERM)
    gate.let_go()
    return until_over(teacher, pods, "preempted", process)


@pytest.fixture(scope="module")
def failed(
    cluster: FakeCluster,
    teacher: Teacher,
    materials: Materials,
    processes: Processes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Ended:
    directory = tmp_path_factory.mktemp("jobs") / "failed"
    wild = {"learning_rate": 1e30, "schedule": "constant", "warmup_steps": 12}
    sections = {"output": "runs/failed", "optimizer": wild, "checkpoint": {"every": 1}}
    job = Job(processes, directory, materials.plain, SERVICE, **sections)
    pods = submitted(cluster, processes, job, materials)
    return until_over(teacher, pods, "failed", pods.start())


def test_a_preempted_job_continues_to_its_end(preempted: Ended) -> None:
    assert preempted.conclusions == ["Ignore", "Complete"]
    assert preempted.described["state"] == "finished"
    steps = [json.loads(line) for line in (preempted.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "step"] == list(range(16))


def test_rows_of_a_teacher_behind_a_service_come_through_shared_memory(preempted: Ended) -> None:
    (door,) = preempted.last.events("rows have a door")
    assert door["door"] == "shm"


def test_what_a_finished_job_leaves_lies_where_it_was_said(preempted: Ended) -> None:
    assert preempted.described["claim"] == "preempted-output"
    assert sorted(path.name for path in (preempted.output / "checkpoints").iterdir())[-1] == "step-00000016"
    assert (preempted.output / "final" / "model.safetensors").is_file()


def test_no_pod_of_a_job_leaves_a_session(preempted: Ended, failed: Ended) -> None:
    assert preempted.sessions == [0, 0]
    assert failed.sessions == [0]


def test_a_failed_job_is_not_tried_again_says_why_and_keeps_its_last_checkpoint(failed: Ended) -> None:
    assert failed.conclusions == ["Failed"]
    assert failed.described["state"] == "failed"
    (pod,) = failed.described["pods"]
    assert pod["reason"].startswith("exit code 2: ")
    assert "finite" in pod["reason"]
    assert "finite" in failed.log
    assert any((failed.output / "checkpoints").glob("step-*"))
