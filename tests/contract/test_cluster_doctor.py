"""What the doctor makes of a cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kdmesh.commands import cli
from tests.support.fake_cluster import JOB_SETS, FakeCluster, fake_cluster


def look(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    result = CliRunner().invoke(cli.main, ["doctor", "--on", "here", "--json", *arguments])
    assert result.exit_code in (0, 1), result.output
    return result.exit_code, {finding["name"]: finding for finding in json.loads(result.output)}


def furnish(cluster: FakeCluster) -> None:
    """GPUs and storage."""
    for machine, gpus in (("one", "8"), ("two", "8"), ("three", "0")):
        cluster.put("nodes", {"metadata": {"name": machine}, "status": {"allocatable": {"nvidia.com/gpu": gpus}}})
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    cluster.put("storageclasses", {"metadata": {"name": "shared", "annotations": default}})


@pytest.fixture(autouse=True)
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))


def test_a_furnished_cluster_lacks_nothing_that_is_needed(tmp_path: Path) -> None:
    with fake_cluster(tmp_path, served={**JOB_SETS, "kueue.x-k8s.io/v1beta1": [], "keda.sh/v1": []}) as cluster:
        furnish(cluster)
        code, found = look("--need", "gpu")
    assert code == 0
    assert found["Kubernetes"]["found"] == f"v1.34.5 at {cluster.address}"
    assert found["the cluster's clock"]["verdict"] == "ok"
    assert found["GPUs of the cluster"]["found"] == "16 on 2 of 3 machines"
    assert found["jobs of several nodes"]["found"] == "as JobSet"
    assert (found["Kueue"]["verdict"], found["Kueue"]["found"]) == ("ok", "kueue.x-k8s.io/v1beta1")
    assert found["KEDA"]["found"] == "keda.sh in v1, where v1alpha1 is wanted"
    assert found["Kubeflow Trainer"]["verdict"] == "worse"
    assert found["storage"]["verdict"] == "ok"


@pytest.mark.parametrize(
    ("served", "forbidden", "name", "code"),
    [
        ({}, None, "jobs of several nodes", 0),
        (JOB_SETS, ("create", "jobs"), "may create jobs", 1),
        (JOB_SETS, ("watch", "endpointslices"), "may watch endpointslices", 0),
        (JOB_SETS, ("list", "nodes"), "GPUs of the cluster", 0),
    ],
)
def test_what_is_not_there_is_told_with_its_cost(
    tmp_path: Path, served: Mapping[str, list[str]], forbidden: tuple[str, str] | None, name: str, code: int
) -> None:
    with fake_cluster(tmp_path, served=served) as cluster:
        furnish(cluster)
        cluster.forbidden |= {forbidden} if forbidden else set()
        exit_code, found = look()
    assert exit_code == code
    assert found[name]["verdict"] == {0: "worse", 1: "missing"}[code] or found[name]["verdict"] == "unknown"
    assert found[name]["cost"] or "your account may not" in found[name]["found"]


def test_a_cluster_without_gpus_fails_who_needs_them(tmp_path: Path) -> None:
    with fake_cluster(tmp_path):
        assert look()[0] == 0
        code, found = look("--need", "gpu")
    assert code == 1
    assert found["GPUs of the cluster"]["found"] == "no machine of 0 offers nvidia.com/gpu"


def test_a_cluster_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with fake_cluster(tmp_path):
        pass
    result = CliRunner().invoke(cli.main, ["doctor", "--on", "here"])
    assert result.exit_code == 2
    assert "does not answer" in result.output
