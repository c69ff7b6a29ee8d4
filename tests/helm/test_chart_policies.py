"""What holds of every pod that the chart makes, and of what guards them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdmesh.cluster.kinds import KINDS
from kdmesh.cluster.pods import LABELS
from kdmesh.commands.cli import main as cli
from tests.support.rendered_chart import Manifest, ci_values, containers, of_kind, pods, rendered, rendered_with
from tools.helm_chart import render

VALUES = render.values_files()
every_value = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.name.removesuffix("-values.yaml"))
_ROOT = "prepare-sharing"  # changes the owner of a directory of the node, where that is asked for


@every_value
def test_pods_are_ordinary_users_without_privileges(values: Path) -> None:
    for where, pod in pods(rendered(values)):
        user = pod["spec"]["securityContext"]
        assert user["runAsNonRoot"] is True and user["runAsUser"] > 0, where
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert pod["spec"]["automountServiceAccountToken"] is False, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys(), where
        for container in containers(pod):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, where
            assert security["readOnlyRootFilesystem"] is True, where
            assert security["capabilities"]["drop"] == ["ALL"], where
            assert security.get("runAsUser", 1) > 0 or container["name"] == _ROOT, where


def test_an_image_with_a_digest_is_taken_by_it_wherever_it_runs() -> None:
    pinned = yaml.safe_load(ci_values("rollouts").read_text("utf-8"))["images"]
    for where, pod in pods(rendered(ci_values("rollouts"))):
        (name,) = [name for name in ("teacher", "rollout") if name in where.partition("/")[2]]
        wanted = f"registry.example/kdmesh/{name}:1.2.3@{pinned[name]['digest']}"
        assert {container["image"] for container in containers(pod)} == {wanted}


@every_value
def test_capabilities_come_only_with_what_needs_them(values: Path) -> None:
    for _, pod in pods(rendered(values)):
        for container in containers(pod):
            wanted = ["CHOWN"] if container["name"] == _ROOT else []
            assert container["securityContext"]["capabilities"].get("add", []) == wanted


@every_value
def test_every_container_says_what_it_takes(values: Path) -> None:
    for where, pod in pods(rendered(values)):
        for container in containers(pod):
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys() and "memory" in resources["limits"], where


@every_value
def test_only_servers_that_answer_are_probed(values: Path) -> None:
    for where, pod in pods(rendered(values)):
        (server, *_) = pod["spec"]["containers"]
        answers = pod["metadata"]["labels"]["app.kubernetes.io/component"] in ("teacher", "rollout")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert (probe in server) is answers, where
        assert ("ports" in server) is answers, where


@every_value
def test_a_pod_is_given_the_time_that_draining_takes(values: Path) -> None:
    for where, pod in pods(rendered(values)):
        (server, *_) = pod["spec"]["containers"]
        if "readinessProbe" in server:
            drain_s = _config(rendered(values), server["name"])["server"]["drain_s"]
            hook = server.get("lifecycle", {}).get("preStop", {}).get("sleep", {"seconds": 0})
            assert pod["spec"]["terminationGracePeriodSeconds"] >= hook["seconds"] + drain_s + 30, where


@every_value
def test_no_value_holds_a_secret(values: Path) -> None:
    for manifest in rendered(values):
        assert manifest["kind"] != "Secret"
    for where, pod in pods(rendered(values)):
        for container in containers(pod):
            for variable in container.get("env", ()):
                is_secret = re.search("TOKEN|PASSWORD|SECRET", variable["name"]) is not None
                assert ("value" in variable) is not is_secret or "fieldRef" in variable["valueFrom"], where


@every_value
def test_what_is_mounted_is_a_volume_of_the_pod(values: Path) -> None:
    for where, pod in pods(rendered(values)):
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", ())} | {"rows"}  # by a claim template
        for container in containers(pod):
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes, where


@every_value
def test_selectors_find_exactly_the_pods_that_they_are_for(values: Path) -> None:
    manifests = rendered(values)
    labels = [pod["metadata"]["labels"] for _, pod in pods(manifests)]
    for manifest in (*of_kind(manifests, "NetworkPolicy"), *of_kind(manifests, "PodDisruptionBudget")):
        component = manifest["metadata"]["labels"]["app.kubernetes.io/component"]
        selector = manifest["spec"].get("podSelector") or manifest["spec"]["selector"]
        found = [one["app.kubernetes.io/component"] for one in labels if _selects(selector, one)]
        assert found and set(found) <= {component, f"{component}-worker"}
    for service in of_kind(manifests, "Service"):
        found = [one for one in labels if _selects({"matchLabels": service["spec"]["selector"]}, one)]
        assert [one["app.kubernetes.io/component"] for one in found] == [
            service["metadata"]["labels"]["app.kubernetes.io/component"]
        ]


def test_pods_that_only_compute_are_in_the_budget_and_the_policy_of_their_group() -> None:
    manifests = rendered(ci_values("several-nodes"))
    (worker,) = [pod for where, pod in pods(manifests) if where.endswith("workerTemplate")]
    (policy,), (budget,) = of_kind(manifests, "NetworkPolicy"), of_kind(manifests, "PodDisruptionBudget")
    assert _selects(policy["spec"]["podSelector"], worker["metadata"]["labels"])
    assert _selects(budget["spec"]["selector"], worker["metadata"]["labels"])
    everything = [rule for rule in policy["spec"]["ingress"] if "ports" not in rule]
    assert [_selects(rule["from"][0]["podSelector"], worker["metadata"]["labels"]) for rule in everything] == [True]


def test_a_budget_of_none_is_none() -> None:
    (budget,) = of_kind(rendered_with("teacher.disruptionBudget.maxUnavailable=0"), "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 0 and "minAvailable" not in budget["spec"]


def test_policies_deny_what_they_do_not_list() -> None:
    (policy,) = of_kind(
        rendered_with("networkPolicy.clients=[]", "networkPolicy.metrics=[]", "test.enabled=false"), "NetworkPolicy"
    )
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert policy["spec"]["ingress"] is None  # nobody
    (names,) = policy["spec"]["egress"]
    assert {(one["protocol"], one["port"]) for one in names["ports"]} == set(product(("UDP", "TCP"), (53, 5353)))


def test_jobs_that_are_submitted_are_let_in_and_run_as_the_user_that_memory_is_shared_with() -> None:
    (policy,) = of_kind(rendered(ci_values("anonymous-cpu")), "NetworkPolicy")
    clients, *_ = policy["spec"]["ingress"]
    assert _selects(clients["from"][0]["podSelector"], LABELS)
    (_, teacher), *_ = pods(rendered(ci_values("anonymous-cpu")))
    (user,) = [option.default for option in cli.commands["submit"].params if option.name == "user"]
    assert teacher["spec"]["securityContext"]["runAsUser"] == user


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("", 443),
        ("https://hub.example", 443),
        ("http://hub.example/api", 80),
        ("http://hub.example:8080", 8080),
        ("https://[2001:db8::1]", 443),
        ("http://[2001:db8:0:1::2]:8080/api", 8080),
    ],
)
def test_what_fetches_a_model_reaches_the_hub(endpoint: str, port: int) -> None:
    model = json.dumps({"uri": "hf://Qwen/Qwen3-8B", "endpoint": endpoint})
    (policy,) = of_kind(rendered_with(f"teacher.model={model}"), "NetworkPolicy")
    assert {"ports": [{"protocol": "TCP", "port": port}]} in policy["spec"]["egress"]


def test_what_fetches_a_model_has_the_environment_and_the_volumes_that_the_server_is_given() -> None:
    settings = {
        "model": {"uri": "hf://Qwen/Qwen3-8B"},
        "env": {"HTTPS_PROXY": "http://proxy:3128", "REQUESTS_CA_BUNDLE": "/etc/ours/ca.crt"},
        "secretEnv": {"PROXY_USER": {"name": "proxy", "key": "user"}},
        "volumes": [{"name": "ours", "configMap": {"name": "authorities"}}],
        "volumeMounts": [{"name": "ours", "mountPath": "/etc/ours"}],
    }
    manifests = rendered_with(*(f"teacher.{key}={json.dumps(value)}" for key, value in settings.items()))
    (_, pod), *_ = pods(manifests)
    for container in containers(pod):
        names = {variable["name"] for variable in container["env"]}
        assert {"HTTPS_PROXY", "REQUESTS_CA_BUNDLE", "PROXY_USER"} <= names, container["name"]
        assert {"name": "ours", "mountPath": "/etc/ours"} in container["volumeMounts"], container["name"]


@pytest.mark.parametrize("query", ["sum(tokens{job='a', of=\"b\"} > 0)", "sum(tokens)"])
def test_a_query_of_ones_own_reaches_keda_as_it_is(query: str) -> None:
    scaling = json.dumps({"enabled": True, "query": query})
    (scaled,) = of_kind(rendered_with(f"teacher.autoscaling={scaling}"), "ScaledObject")
    assert scaled["spec"]["triggers"][0]["metadata"]["query"] == query


def test_who_may_submit_may_do_so_with_every_kind_of_object_that_a_job_has() -> None:
    roles = {one["metadata"]["name"]: one["rules"] for one in of_kind(rendered(ci_values("several-nodes")), "Role")}
    allowed = {
        (group, resource)
        for rule in roles["qwen-submitter"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        if {"get", "list"} <= set(rule["verbs"])
    }
    assert {(kind.group, kind.plural) for kind in KINDS.values()} <= allowed
    assert not any("secrets" in rule["resources"] for rules in roles.values() for rule in rules)


def test_private_groups_open_every_port_to_clients_and_nobody_else() -> None:
    (policy,) = of_kind(rendered_with("teacher.config.server.groups=true"), "NetworkPolicy")
    clients, *others = policy["spec"]["ingress"]
    assert "ports" not in clients and all("ports" in rule for rule in others)
    assert clients["from"] in [rule.get("to") for rule in policy["spec"]["egress"]]


def test_by_default_a_teacher_needs_nothing_that_restricted_pod_security_forbids() -> None:
    for values in ("anonymous-cpu", "shared-node"):
        for _, pod in pods(rendered(ci_values(values))):
            allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
            for volume in pod["spec"].get("volumes", ()):
                assert volume.keys() - {"name"} <= allowed


@pytest.mark.parametrize(
    ("values", "kind", "name"),
    [
        ("several-nodes", "LeaderWorkerSet", "teacher"),
        ("shared-node", "StatefulSet", "teacher"),
        ("rollouts", "Deployment", "rollout"),
    ],
)
def test_a_queue_is_named_on_the_object_where_kueue_looks_for_it(values: str, kind: str, name: str) -> None:
    label = {"kueue.x-k8s.io/queue-name": "serving"}
    (made,) = of_kind(rendered_with(f"{name}.podLabels={json.dumps(label)}", values=values), kind)
    assert label.items() <= made["metadata"]["labels"].items()


def test_replicas_are_left_to_what_scales_them() -> None:
    (group,) = of_kind(rendered(ci_values("several-nodes")), "LeaderWorkerSet")
    (scaled,) = of_kind(rendered(ci_values("several-nodes")), "ScaledObject")
    assert "replicas" not in group["spec"]
    assert scaled["spec"]["scaleTargetRef"] == {
        "apiVersion": group["apiVersion"],
        "kind": group["kind"],
        "name": group["metadata"]["name"],
    }
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["metadata"]["threshold"] == "2000000" and trigger["metadata"]["ignoreNullValues"] == "false"


def test_what_scales_shows_a_prometheus_that_asks_a_token_of_a_secret() -> None:
    manifests = rendered(ci_values("several-nodes"))
    (scaled,), (shown,) = of_kind(manifests, "ScaledObject"), of_kind(manifests, "TriggerAuthentication")
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["authenticationRef"] == {"name": shown["metadata"]["name"]}
    assert trigger["metadata"]["authModes"] == "bearer"
    assert shown["spec"]["secretTargetRef"] == [
        {"parameter": "bearerToken", "name": "keda-viewer", "key": "token"},
        {"parameter": "ca", "name": "monitoring-ca", "key": "service-ca.crt"},
    ]
    plain = rendered_with("teacher.autoscaling.enabled=true")
    (trigger,) = of_kind(plain, "ScaledObject")[0]["spec"]["triggers"]
    assert of_kind(plain, "TriggerAuthentication") == []
    assert "authenticationRef" not in trigger and "authModes" not in trigger["metadata"]


def test_what_scales_asks_for_a_metric_that_the_servers_have() -> None:
    from kdmesh_rollout import metrics as rollout_metrics
    from kdmesh_teacher import metrics as teacher_metrics

    (scaled,) = of_kind(rendered(ci_values("several-nodes")), "ScaledObject")
    (scaler,) = of_kind(rendered(ci_values("drills")), "HorizontalPodAutoscaler")
    (teacher,) = re.findall(r"kdmesh_teacher_(\w+)", scaled["spec"]["triggers"][0]["metadata"]["query"])
    (rollout,) = re.findall(r"kdmesh_rollout_(\w+)", scaler["spec"]["metrics"][0]["pods"]["metric"]["name"])
    assert f'"{teacher}"' in Path(teacher_metrics.__file__).read_text("utf-8")
    assert f'"{rollout}"' in Path(rollout_metrics.__file__).read_text("utf-8")


def test_fetched_models_stay_when_the_release_goes() -> None:
    (claim,) = of_kind(rendered(ci_values("several-nodes")), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_change_of_the_configuration_restarts_the_pods() -> None:
    def digest(*settings: str) -> str:
        ((_, pod), *_) = pods(rendered_with(*settings))
        return str(pod["metadata"]["annotations"]["checksum/config"])

    assert digest() == digest("networkPolicy.enabled=false") != digest("teacher.config.server.drain_s=45")


def _config(manifests: tuple[Manifest, ...], name: str) -> Manifest:
    texts = [one["data"][f"{name}.yaml"] for one in of_kind(manifests, "ConfigMap") if f"{name}.yaml" in one["data"]]
    config: Manifest = yaml.safe_load(texts[0])
    return config


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(_facts(selector, labels))


def _facts(selector: dict[str, Any], labels: dict[str, str]) -> Iterator[bool]:
    yield from (labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        yield labels.get(expression["key"]) in expression["values"]
