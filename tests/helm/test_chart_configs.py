"""The configurations that the chart renders, read by the services themselves, with the arguments of their pods."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdmesh import config
from kdmesh.auth.config import AccessConfig
from kdmesh.preflight import check
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.file import JobFile
from kdmesh_rollout.config import RolloutConfig
from kdmesh_teacher.config import TeacherConfig, TeacherJobTerms
from kdmesh_teacher.sglang.config import SglangEngine
from tests.support.rendered_chart import Manifest, ci_values, of_kind, pods, rendered
from tools.helm_chart import render

# What Kubernetes, or LeaderWorkerSet, puts into the pod.
_VARIABLES = {
    "POD_NAME": "demo-teacher-0",
    "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
    "LWS_LEADER_ADDRESS": "demo-teacher-0.demo-teacher-0.research",
}
_KINDS: dict[str, type[TeacherConfig] | type[RolloutConfig]] = {"teacher": TeacherConfig, "rollout": RolloutConfig}
every_value = pytest.mark.parametrize(
    "values", render.values_files(), ids=lambda path: path.name.removesuffix("-values.yaml")
)


@every_value
def test_services_take_the_configurations_that_are_rendered(values: Path, tmp_path: Path) -> None:
    manifests = rendered(values)
    servers = [pod for _, pod in pods(manifests) if pod["spec"]["containers"][0]["name"] in _KINDS]
    assert servers == [pod for _, pod in _loaded(manifests, tmp_path)]


@every_value
def test_the_files_that_a_configuration_names_are_mounted(values: Path, tmp_path: Path) -> None:
    for loaded, pod in _loaded(rendered(values), tmp_path):
        (server, *_) = pod["spec"]["containers"]
        mounts = [Path(mount["mountPath"]) for mount in server["volumeMounts"]]
        for line in check.missing(loaded):  # nothing of it is on this machine
            (path,) = re.findall(r"there is no (?:file|directory) (\S+)", line)
            assert any(Path(path).is_relative_to(mount) for mount in mounts), line


@every_value
def test_the_notes_tell_trainers_all_that_the_servers_ask_for(values: Path, tmp_path: Path) -> None:
    dry_run = ("install", render.RELEASE, str(render.CHART), "--namespace", render.NAMESPACE, "--dry-run=client")
    _, _, notes = render.run_helm("helm4", *dry_run, "--values", str(values)).stdout.partition("\nNOTES:\n")
    sections = re.findall(r"In a training configuration:\n\n((?: +.+\n)+)", notes)
    said = [yaml.safe_load(section) for section in sections]
    told = {name: one for name in ("teacher", "rollouts") for one in map(partial(_told, name), said) if one}
    asked = {type(loaded): loaded.server for loaded, _ in _loaded(rendered(values), tmp_path)}
    assert len(told) == len(said) == len(asked)
    for name, kind in (("teacher", TeacherConfig), ("rollouts", RolloutConfig)):
        if kind in asked:
            server, access = asked[kind], AccessConfig.model_validate(told[name].get("access", {}))
            assert told[name]["addresses"][0].endswith(f":{server.port}")
            assert (access.token_file is None) is (server.auth is None)
            assert (access.tls is None) is (server.tls is None)
            if access.tls is not None and server.tls is not None:
                assert (access.tls.cert is None) is (server.tls.client_ca is None)


@every_value
def test_services_take_the_terms_of_jobs_that_are_rendered(values: Path, tmp_path: Path) -> None:
    terms: dict[str, type[JobTerms]] = {"teacher": TeacherJobTerms, "rollout": JobTerms}
    for manifest in of_kind(rendered(values), "ConfigMap"):
        if "jobs.yaml" in manifest["data"]:
            path = tmp_path / "jobs.yaml"
            path.write_text(manifest["data"]["jobs.yaml"], encoding="utf-8")
            name = manifest["metadata"]["labels"]["app.kubernetes.io/component"]
            read = config.load(JobFile[terms[name]], path).overrides  # type: ignore[valid-type]
            assert set(read) == ({"production", "nightly-eval"} if values.name.startswith("several") else set())


def test_nodes_of_a_group_know_their_place(tmp_path: Path) -> None:
    values = ci_values("several-nodes")
    for loaded, _ in _loaded(rendered(values), tmp_path):
        assert isinstance(loaded, TeacherConfig) and isinstance(loaded.engine, SglangEngine)
        assert (loaded.engine.num_nodes, loaded.engine.node_rank) == (2, 1)
        assert loaded.engine.dist_init_address == "demo-teacher-0.demo-teacher-0.research:20000"
        # A node may have a pod of the same name in another namespace, and the same directory mounted in both.
        assert loaded.server.runtime_dir == Path("/run/kdmesh/research.demo-teacher-0")


def test_large_numbers_stay_whole_numbers(tmp_path: Path) -> None:
    values = ci_values("several-nodes")
    (loaded, _), *_ = _loaded(rendered(values), tmp_path)
    assert isinstance(loaded, TeacherConfig)
    assert loaded.queue.max_tokens == 8_000_000
    assert loaded.jobs.defaults.max_bytes_in_flight == 2**30


def test_a_port_of_the_configuration_is_that_of_the_service_and_the_probes() -> None:
    for values in render.values_files():
        for service in of_kind(rendered(values), "Service"):
            for where, pod in pods(rendered(values)):
                (server, *_) = pod["spec"]["containers"]
                if (
                    server.get("ports")
                    and server["name"] == service["metadata"]["labels"]["app.kubernetes.io/component"]
                ):
                    assert [port["containerPort"] for port in server["ports"]] == [
                        port["port"] for port in service["spec"]["ports"]
                    ], where


def _loaded(manifests: tuple[Manifest, ...], folder: Path) -> Iterator[tuple[TeacherConfig | RolloutConfig, Manifest]]:
    """Each server's configuration as its container's command reads it, with its pod."""
    files = {one["metadata"]["name"]: one["data"] for one in of_kind(manifests, "ConfigMap")}
    for _, pod in pods(manifests):
        (server, *_) = pod["spec"]["containers"]
        if server["command"] != ["kdmesh"]:
            continue
        name, path, *options = [_expanded(argument) for argument in server["args"]]
        assert options[::2] == ["--set"] * (len(options) // 2)
        (config_map,) = [one["configMap"]["name"] for one in pod["spec"]["volumes"] if one["name"] == "config"]
        local = folder / Path(path).name
        local.write_text(files[config_map][local.name], encoding="utf-8")
        yield config.load(_KINDS[name], local, options[1::2]), pod


def _expanded(argument: str) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: _VARIABLES[match[1]], argument)


def _told(name: str, said: dict[str, Any]) -> dict[str, Any] | None:
    found: dict[str, Any] | None = said.get("source", said).get(name)
    return found


def test_the_page_s_values_make_the_account_that_its_job_runs_as(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/kubernetes.md").read_text(encoding="utf-8")
    section = page.partition("## Ten minutes")[2].partition("\n## ")[0]
    (text,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (account,) = re.findall(r"--service-account qwen(\S+)", section)
    values = tmp_path / "teacher-values.yaml"
    values.write_text(text, encoding="utf-8")
    names = [made["metadata"]["name"] for made in of_kind(rendered(values), "ServiceAccount")]
    assert any(name.endswith(account) for name in names)


def test_the_page_s_job_is_let_out_to_the_service_of_its_values(tmp_path: Path) -> None:
    """Its token may travel as the page's access says, and the service has the port that its address names."""
    page = (Path(__file__).resolve().parents[2] / "docs/kubernetes.md").read_text(encoding="utf-8")
    section = page.partition("## Ten minutes")[2].partition("\n## ")[0]
    (values_text,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (client_text,) = re.findall(r"```\n(teacher:\n.*?)```", section, re.DOTALL)
    client = yaml.safe_load(client_text)["teacher"]
    (address,) = client["addresses"]
    access = AccessConfig.model_validate(client["access"])
    assert access.token_file is not None
    assert access.refusal(address) is None
    values = tmp_path / "teacher-values.yaml"
    values.write_text(values_text, encoding="utf-8")
    (service,) = of_kind(rendered(values), "Service")
    name, _, port = address.removeprefix("k8s:///").partition(".research:")
    assert service["metadata"]["name"].removeprefix("demo") == name.removeprefix("qwen")
    assert port in {one["name"] for one in service["spec"]["ports"]}
