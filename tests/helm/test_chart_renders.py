"""The chart's ci values, rendered: the same by both majors of helm, as the golden files say, and as clusters want."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.support.cluster_schemas import CRDS, CUSTOM, problems
from tests.support.operator_models import MODELS, understood
from tests.support.rendered_chart import ci_values, of_kind, pods, rendered, rendered_text, rendered_with
from tools.helm_chart import render

VALUES = render.values_files()
VERSIONS = ("1.27", "1.30", "1.34", "1.37")
every_value = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.name.removesuffix("-values.yaml"))
needs_definitions = pytest.mark.skipif(not CRDS.is_dir(), reason=f"there are no definitions in {CRDS}")
every_version = pytest.mark.parametrize("version", VERSIONS)


@every_value
def test_both_majors_of_helm_render_the_same_bytes(values: Path) -> None:
    assert rendered_text(values, helm="helm3") == rendered_text(values, helm="helm4")


@every_value
@pytest.mark.parametrize("helm", ["helm3", "helm4"])
def test_helm_finds_nothing_to_complain_of(values: Path, helm: render.Helm) -> None:
    done = render.run_helm(helm, "lint", str(render.CHART), "--strict", "--values", str(values))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout and "[ERROR]" not in done.stdout


def test_the_golden_files_are_those_of_the_ci_values() -> None:
    assert sorted(path for path, _, _ in render.golden_files()) == sorted(render.GOLDEN.glob("*"))


@pytest.mark.parametrize("golden", list(render.golden_files()), ids=lambda golden: golden[0].stem)
def test_the_ci_values_render_to_their_golden_files(golden: tuple[Path, Path, str]) -> None:
    path, values, version = golden
    assert render.without_files(rendered_text(values, version)) == path.read_text("utf-8"), "see `make helm`"


@every_value
@every_version
def test_kubernetes_knows_every_key(values: Path, version: str) -> None:
    for manifest in rendered(values, version):
        if manifest["kind"] not in MODELS.keys() | CUSTOM:
            assert problems(manifest, version) == []


@every_version
def test_kubernetes_knows_every_key_of_the_pods_of_other_projects_kinds(version: str) -> None:
    groups = of_kind(rendered(ci_values("several-nodes"), version), "LeaderWorkerSet")
    found = list(pods(tuple(groups)))
    assert [where.rpartition("/")[2] for where, _ in found] == ["leaderTemplate", "workerTemplate"]
    for _, pod in found:
        assert problems(pod, version) == []


def test_a_group_of_pods_finds_its_leader_before_that_is_ready() -> None:
    manifests = rendered(ci_values("several-nodes"))
    (group,) = of_kind(manifests, "LeaderWorkerSet")
    assert group["spec"]["networkConfig"] == {"subdomainPolicy": "UniquePerReplica"}
    # LeaderWorkerSet makes a Service of each group's name, unless there is one: ours would hide who is not ready.
    taken = {service["metadata"]["name"] for service in of_kind(manifests, "Service")}
    assert not taken & {f"{group['metadata']['name']}-{number}" for number in range(9)}


def test_only_the_leader_of_a_group_shares_memory_with_clients() -> None:
    sharing = ['teacher.sharing.mode="claim"', 'teacher.sharing.node="gpu-1"']
    groups = tuple(of_kind(rendered_with(*sharing, values="several-nodes"), "LeaderWorkerSet"))
    shared = [volume for _, pod in pods(groups) for volume in pod["spec"]["volumes"] if volume["name"] == "sharing"]
    assert ["persistentVolumeClaim" in volume for volume in shared] == [True, False]


def test_the_definitions_of_other_projects_are_there() -> None:
    assert CRDS.is_dir(), f"there is no {CRDS}: they lie in shared/data, beside the repository"


@needs_definitions
@every_value
def test_objects_of_other_projects_fit_their_definitions(values: Path) -> None:
    for manifest in rendered(values):
        if manifest["kind"] in CUSTOM:
            assert problems(manifest) == []
        if manifest["kind"] in MODELS:
            assert understood(manifest)["spec"] == manifest["spec"]


@needs_definitions
def test_the_definitions_refuse_what_their_projects_refuse() -> None:
    (scaled,) = of_kind(rendered(ci_values("several-nodes")), "ScaledObject")
    assert problems(scaled | {"spec": scaled["spec"] | {"minReplicaCount": 9}}) == [
        "spec: minReplicaCount must be less than or equal to maxReplicaCount"
    ]
    (certificate,) = of_kind(rendered(ci_values("several-nodes")), "Certificate")
    assert "duratoin" not in understood(certificate | {"spec": certificate["spec"] | {"duratoin": "1h"}})["spec"]
    (shown,) = of_kind(rendered(ci_values("several-nodes")), "TriggerAuthentication")
    assert "secretTargetRefs" not in understood(shown | {"spec": {"secretTargetRefs": []}})["spec"]
    (group,) = of_kind(rendered(ci_values("several-nodes")), "LeaderWorkerSet")
    assert "'Leader' is not one of" in problems(group | {"spec": group["spec"] | {"startupPolicy": "Leader"}})[0]
    assert "'nodes' was unexpected" in problems(group | {"spec": group["spec"] | {"nodes": 2}})[0]


def test_every_object_is_in_the_release_s_namespace_and_has_its_labels() -> None:
    for values in VALUES:
        for manifest in rendered(values):
            labels = manifest["metadata"]["labels"]
            assert labels["app.kubernetes.io/instance"] == render.RELEASE
            assert manifest["metadata"].get("namespace") in (None, render.NAMESPACE)


def test_rules_and_dashboards_are_the_chart_s_files() -> None:
    manifests = rendered(ci_values("several-nodes"))
    rules = [yaml.safe_load(path.read_text("utf-8")) for path in sorted((render.CHART / "files/rules").glob("*.yaml"))]
    assert [one["spec"] for one in of_kind(manifests, "PrometheusRule")] == rules
    shown = [
        json.loads(text)
        for one in of_kind(manifests, "ConfigMap")
        if "grafana_dashboard" in one["metadata"]["labels"]
        for text in one["data"].values()
    ]
    assert shown == [
        json.loads(path.read_text("utf-8")) for path in sorted((render.CHART / "files/dashboards").glob("*"))
    ]
