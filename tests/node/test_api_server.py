"""The chart, submitted jobs and their roles on a real API server of Kubernetes; by name only."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kdmesh.cluster.client import Cluster
from kdmesh.cluster.kinds import ENDPOINT_SLICE, JOB, KINDS, POD, Kind
from kdmesh.commands import cli
from tests.node.api_server import NAMESPACE, PERSON, ApiServer, lost, older
from tests.support.cluster_schemas import CRDS
from tests.support.rendered_chart import ci_values, of_kind, rendered
from tests.system.processes import Processes
from tools.helm_chart import render

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]

VALUES = render.values_files()
DEFINITIONS = ("jobset.yaml", "lws.yaml", "keda-so.yaml")
MOUNTS = ("--volume", "models:/models", "--volume", "data:/data")
SUBMIT = ("submit", "train.yaml", "--image", "registry.example/trainer:1", *MOUNTS)
SECRET = Kind(name="Secret", plural="secrets", group="", version="v1")
# Of prometheus-operator, cert-manager and KEDA, whose definitions are not here.
_ELSEWHERE = {"Certificate", "PodMonitor", "PrometheusRule", "ServiceMonitor", "TriggerAuthentication"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    directory = tmp_path_factory.mktemp("api-server") / "own"
    with Processes() as processes, closing(ApiServer(processes, directory)) as running:
        running.send({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        for name in DEFINITIONS:
            running.define(yaml.load((CRDS / name).read_text("utf-8"), Loader=yaml.CSafeLoader))
        for manifest in rendered(ci_values("several-nodes"), "1.27"):
            if manifest["kind"] in ("Role", "RoleBinding", "ServiceAccount"):
                running.send(manifest)
        yield running


@pytest.fixture
def person(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Somebody of the group that the chart lets submit, in a directory with a configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(PERSON, "ann")))
    tree = {
        "output": "runs/my-student",
        "steps": 10,
        "student": {"model": "/models/student"},
        "teacher": {"addresses": ["teacher.research:50051"]},
        "data": {"train": {"format": "chat", "path": "/data/train.jsonl"}},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    cluster = Cluster()
    yield cluster
    cluster.close()


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == code, result.output or result.exception
    return result.output


def submit(name: str, *more: str) -> str:
    return run(*SUBMIT, "--name", name, *more)


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def test_it_takes_all_of_the_chart_s_objects_and_keeps_what_they_say(server: ApiServer, values: Path) -> None:
    tried = 0
    for manifest in rendered(values, "1.27"):
        sent = older(manifest)
        if sent["kind"] in ("Role", "RoleBinding", "ServiceAccount") and values == ci_values("several-nodes"):
            continue  # they are there already
        if not server.knows(sent):
            assert sent["kind"] in _ELSEWHERE
            continue
        made = server.send(sent, is_only_tried=True)
        assert list(lost(sent, made)) == [], sent["kind"]
        tried += 1
    assert tried >= 7


def test_it_refuses_what_no_schema_finds(server: ApiServer) -> None:
    (found,) = of_kind(rendered(ci_values("rollouts"), "1.27"), "Deployment")
    deployment = copy.deepcopy(found)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["volumeMounts"][0]["name"] = "nowhere"
    with pytest.raises(AssertionError, match="nowhere"):
        server.send(deployment, is_only_tried=True)


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_a_job_is_submitted_looked_at_and_ended_by_whom_the_chart_lets(person: Cluster, kind: str) -> None:
    name = f"by-{kind.lower()}"
    nodes = () if kind == "Job" else ("--nodes", "2", "--kind", "JobSet")
    assert submit(name, *nodes).startswith(f"{kind} {name} is in namespace {NAMESPACE}\n")
    (config,) = [one for one in person.find(KINDS["ConfigMap"]) if one["metadata"]["name"] == f"{name}-config"]
    made = person.get(KINDS[kind], name)
    assert made is not None
    assert config["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]
    (job,) = [one for one in json.loads(run("jobs", "--json")) if one["name"] == name]
    assert job["kind"] == kind
    assert f"{kind} {name} in namespace {NAMESPACE}" in run("describe", name)
    assert f"there is a {kind} {name}" in run(*SUBMIT, "--name", name, code=2)
    run("cancel", name)
    submit(f"{name}-2", *nodes)


def test_whom_the_chart_lets_submit_reads_no_secret_and_starts_no_pod(person: Cluster) -> None:
    assert person.may("create", JOB) and person.may("watch", ENDPOINT_SLICE)
    assert not person.may("get", SECRET) and not person.may("list", SECRET)
    assert not person.may("create", POD)


def test_the_account_of_jobs_looks_servers_up_and_does_nothing_else(server: ApiServer) -> None:
    accounts = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/qwen-trainer/token"
    asked: dict[str, Any] = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = server.admin.post(accounts, json=asked).json()["status"]["token"]
    with server.client(token) as account:
        slices = account.get(f"/apis/discovery.k8s.io/v1beta1/namespaces/{NAMESPACE}/endpointslices")
        assert slices.status_code == 200
        for path in ("pods", "secrets", "configmaps"):
            assert account.get(f"/api/v1/namespaces/{NAMESPACE}/{path}").status_code == 403
        elsewhere = account.get("/apis/discovery.k8s.io/v1beta1/namespaces/default/endpointslices")
        assert elsewhere.status_code == 403


def test_a_watch_goes_on_from_a_list_and_misses_nothing(person: Cluster) -> None:
    labels = "kdmesh.dev/job=watched"
    before, since = person.snapshot(JOB, labels=labels)
    assert before == []
    submit("watched")
    person.patch(JOB, "watched", {"metadata": {"annotations": {"seen": "yes"}}})
    submit("another")
    assert person.delete(JOB, "watched")
    changes = []
    for change in person.watch(JOB, labels=labels, since=since, seconds=20):
        assert change.thing["metadata"]["name"] == "watched"
        changes.append(change.kind)
        if change.kind == "DELETED":
            break
    assert changes[0] == "ADDED" and set(changes[1:-1]) <= {"MODIFIED"} and len(changes) >= 3
