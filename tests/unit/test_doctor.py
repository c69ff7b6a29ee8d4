"""What the doctor makes of a machine, as it is and as it could be."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdmesh.commands import cli
from kdmesh.doctor import command, devices, kernel, limits, software
from kdmesh.doctor.finding import Finding, ok
from kdmesh.handles.slab.memory import Segment
from kdmesh.launch import local


def named(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def look(monkeypatch: pytest.MonkeyPatch, *findings: Finding, arguments: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit code and output where these are what is found."""
    monkeypatch.setattr(command, "_of_machine", lambda runtime_dir: findings)
    result = CliRunner().invoke(cli.main, ["doctor", *arguments])
    return result.exit_code, result.output


def test_this_machine_has_what_its_tests_need(tmp_path: Path) -> None:
    found = [*kernel.kernel(tmp_path), *limits.limits(), *devices.devices(), *software.software()]
    assert [finding for finding in found if finding.verdict == "missing"] == []
    assert all(finding.cost for finding in found if finding.verdict == "worse")
    assert all(finding.cure for finding in found if finding.verdict == "worse")
    assert named(found, "socket directory").found == f"a descriptor was passed through a socket in {tmp_path}"
    assert list(tmp_path.iterdir()) == []


def test_what_is_piped_has_no_blanks_at_the_ends_of_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    far = Finding(name="far", part="sglang", verdict="worse", found="nothing", cost="it is slow", cure="w " * 200)
    code, output = look(monkeypatch, ok("near", "all is there", part="gpu"), far)
    assert code == 0
    assert output.startswith("ok     near  all is there\nworse  far   nothing\n             costs: it is slow\n")
    assert output.endswith("\n\nNothing is missing that is needed.\nWorse than it could be: far.\n")
    assert [line for line in output.splitlines() if line != line.rstrip() or len(line) > 160] == []


def test_memory_that_can_be_written_all_the_same_is_no_sealed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = kernel.create_segment

    def unsealed(size_bytes: int) -> Segment:
        monkeypatch.setattr("kdmesh.handles.slab.memory._SEALS", 0)
        return made(size_bytes)

    monkeypatch.setattr(kernel, "create_segment", unsealed)
    found = named(list(kernel.kernel(None)), "sealed memory")
    assert found.verdict == "missing"
    assert found.found == "the seal F_SEAL_FUTURE_WRITE does not keep others from writing"


def test_a_kernel_without_memfds_is_told_with_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.memfd_create", refuse)
    monkeypatch.setattr("os.pidfd_open", refuse)
    found = list(kernel.kernel(None))
    assert [finding.verdict for finding in found] == ["missing"] * 3
    assert "no teacher or rollout server can start here" in found[0].cost


def test_a_socket_directory_may_be_deep_and_must_be_there(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    assert named(list(kernel.kernel(deep)), "socket directory").found == f"there is no directory {deep}"
    deep.mkdir(parents=True)
    assert named(list(kernel.kernel(deep)), "socket directory").verdict == "ok"


def test_limits_that_are_too_low_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 2048))
    found = list(limits.limits())
    assert named(found, "locked memory").found == "at most 1 KiB"
    assert (named(found, "open files").verdict, named(found, "open files").found) == ("worse", "at most 2048")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (24, 24))
    assert named(list(limits.limits()), "open files").verdict == "missing"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert named(list(limits.limits()), "locked memory").verdict == "ok"
    assert named(list(limits.limits()), "open files").verdict == "ok"


@pytest.mark.parametrize(
    ("state", "has_verbs", "verdict", "words"),
    [
        ("4: ACTIVE", True, "ok", "active ports: mlx5_0/1"),
        ("4: ACTIVE", False, "worse", "no uverbs for this process"),
        ("1: DOWN", True, "worse", "1 ports, none of them active"),
        (None, False, "worse", "none"),
    ],
)
def test_rdma_adapters_need_an_active_port_and_a_device_file(
    tmp_path: Path, state: str | None, has_verbs: bool, verdict: str, words: str
) -> None:
    adapters, verbs = tmp_path / "infiniband", tmp_path / "dev"
    verbs.mkdir()
    if has_verbs:
        (verbs / "uverbs0").touch()
    if state is not None:
        port = adapters / "mlx5_0" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    found = named(list(devices.devices(adapters, verbs)), "RDMA adapters")
    assert found.verdict == verdict
    assert words in found.found


@pytest.mark.parametrize(
    ("value", "verdict"), [("rc,self", "ok"), ("rc_mlx5,dc,self", "ok"), ("tcp,rc", "worse"), ("", "worse")]
)
def test_ucx_may_use_rdma_and_nothing_else(monkeypatch: pytest.MonkeyPatch, value: str, verdict: str) -> None:
    monkeypatch.setenv("UCX_TLS", value)
    assert named(list(devices.devices()), "UCX_TLS").verdict == verdict


def test_gpus_that_torch_cannot_use_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "num_gpus", lambda: 2)
    monkeypatch.setattr(devices, "_seen_by_torch", lambda: (0, "2.13.0+cpu is built for CPUs"))
    found = named(list(devices.devices()), "GPUs")
    assert (found.verdict, found.found) == (
        "missing",
        "this process has 2, and torch can use none: 2.13.0+cpu is built for CPUs",
    )


def test_packages_of_other_versions_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "version", lambda name: "0.0.1")
    found = list(software.software())
    assert named(found, "torch").verdict == "missing"
    assert named(found, "torch").found.startswith("0.0.1, where >=")
    assert named(found, "peft").verdict == "worse"


def test_the_exit_code_says_whether_something_is_missing_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = ok("memory", "enough")
    slow = Finding(name="GPUs", verdict="worse", found="none", cost="slow", cure="buy some", part="gpu")
    code, said = look(monkeypatch, fine, slow)
    assert code == 0
    assert "Nothing is missing that is needed.\nWorse than it could be: GPUs." in said
    assert "costs: slow" in said
    code, said = look(monkeypatch, fine, slow, arguments=("--need", "gpu"))
    assert code == 1
    assert "Missing: GPUs." in said
    code, said = look(monkeypatch, fine, slow, arguments=("--need", "gpu", "--json"))
    assert code == 1
    assert [one["verdict"] for one in json.loads(said)] == ["ok", "missing"]
