"""Teachers found behind a service of a cluster: real servers, and an API server that says where they are."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdmesh.cluster.client import Cluster
from kdmesh.rpc.fleet.discovery import Discovery
from kdmesh.rpc.fleet.routing import RoutingPolicy
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.fleet import TeacherFleet
from kdmesh.rpc.teachers.session_options import SessionOptions
from tests.support.fake_cluster import FakeCluster, fake_cluster
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import RunningTeacher, running_teacher

SERVICE = "k8s:///teachers.ml:grpc"
PROMPT = RoutingPolicy(slow_start_s=0, local_tokens=10**6)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with fake_cluster(tmp_path) as running:
        yield running


def say(cluster: FakeCluster, *endpoints: dict[str, Any], name: str = "teachers-1", port: int = 0) -> None:
    """One slice of the service."""
    kind = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4"}
    metadata = {"name": name, "labels": {"kubernetes.io/service-name": "teachers"}}
    ports = [{"name": "rest", "port": 8051}, {"name": "grpc", "port": port}]
    cluster.put("endpointslices", {**kind, "metadata": metadata, "ports": ports, "endpoints": list(endpoints)})


def at(teacher: RunningTeacher, *, ready: bool = True, machine: str = "machine-1") -> dict[str, Any]:
    host = teacher.addresses.grpc.rpartition(":")[0]
    return {"addresses": [host], "conditions": {"ready": ready}, "nodeName": machine}


def port_of(teacher: RunningTeacher) -> int:
    return int(teacher.addresses.grpc.rpartition(":")[2])


@contextlib.asynccontextmanager
async def fleet(discovery: Discovery) -> AsyncIterator[TeacherFleet]:
    opened = TeacherFleet(discovery, SessionOptions(job="test", door="stream"), routing=PROMPT)
    try:
        await opened.start(Deadline.after(20))
        yield opened
    finally:
        await opened.close()


async def ask(opened: TeacherFleet, seed: int = 0) -> None:
    asked = sequence(9, seed=seed)
    rows = await opened.ask([asked], Deadline.after(20), weight_version=1)
    assert torch.equal(rows.rows_RD, expected_rows([asked]))


async def until(opened: TeacherFleet, *teachers: RunningTeacher) -> None:
    """Return when exactly these are wanted."""
    while opened._replicas.addresses != {teacher.addresses.grpc for teacher in teachers}:
        await opened._replicas._change()


async def why_none(entry: str) -> str:
    """What a discovery that finds nobody says."""
    discovery = Discovery([entry])
    assert await discovery.look() == []
    while not discovery.last_error:
        await discovery.wait(5)
        assert await discovery.look() == []
    await discovery.close()
    return discovery.last_error


async def test_teachers_that_come_and_go_behind_a_service_are_used_and_dropped(
    tmp_path: Path, cluster: FakeCluster
) -> None:
    async with running_teacher(tmp_path / "1") as first, running_teacher(tmp_path / "2") as second:
        say(cluster, at(first), port=port_of(first))
        async with fleet(Discovery([SERVICE])) as opened:
            await ask(opened)
            assert len(first.engine.batches) > 0
            say(cluster, at(second, ready=False), name="teachers-2", port=port_of(second))
            say(cluster, at(second), name="teachers-2", port=port_of(second))
            await until(opened, first, second)
            before = len(second.engine.batches)
            while len(second.engine.batches) == before:
                await ask(opened)
            say(cluster, at(first, ready=False), port=port_of(first))
            await until(opened, second)
            asked = len(first.engine.batches)
            for seed in range(4):
                await ask(opened, seed)
            assert len(first.engine.batches) == asked
            say(cluster, at(first), port=port_of(first))
            cluster.remove("endpointslices", "teachers-2")
            await until(opened, first)
            await ask(opened)
        assert cluster.num_asked("GET", "/namespaces/ml/endpointslices") < 8  # it watches instead of asking again


async def test_a_teacher_on_the_same_machine_is_preferred(tmp_path: Path, cluster: FakeCluster) -> None:
    async with running_teacher(tmp_path / "1") as near, running_teacher(tmp_path / "2") as far:
        say(cluster, at(near, machine="here"), port=port_of(near))
        say(cluster, at(far, machine="there"), name="teachers-2", port=port_of(far))
        async with fleet(Discovery([SERVICE], machine="here")) as opened:
            await until(opened, near, far)
            while len(opened._replicas.clients) < 2:
                await opened._replicas._change()
            own = len(far.engine.batches)
            for seed in range(12):
                await ask(opened, seed)
            assert len(far.engine.batches) == own


async def test_the_three_kinds_of_address_go_together(tmp_path: Path, cluster: FakeCluster) -> None:
    async def resolve(name: str, port: int) -> list[str]:
        return [f"10.0.0.2:{port}"]

    say(cluster, {"addresses": ["10.0.0.3"], "conditions": {}}, port=7)
    discovery = Discovery(["10.0.0.1:7", "dns:///named:7", "k8s:///teachers:7"], resolve)
    assert discovery.changes
    while len(await discovery.look()) < 3:
        await discovery.wait(5)
    assert await discovery.look() == ["10.0.0.1:7", "10.0.0.2:7", "10.0.0.3:7"]
    await discovery.close()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("k8s:///nobody.ml:grpc", "namespace ml has no service nobody, or it selects no pod"),
        ("k8s:///teachers.ml:http", "has no port http; it has grpc (7), rest (8051)"),
        ("k8s:///teachers.ml:grpc", "no server of the service teachers in namespace ml is ready"),
    ],
)
async def test_why_nobody_was_found_is_told(cluster: FakeCluster, entry: str, words: str) -> None:
    say(cluster, {"addresses": ["10.0.0.3"], "conditions": {"ready": False}}, port=7)
    assert words in await why_none(entry)


async def test_what_the_account_may_not_is_told_as_the_reason(cluster: FakeCluster) -> None:
    cluster.forbidden.add(("list", "endpointslices"))
    assert 'cannot list resource "endpointslices" in the namespace "ml"' in await why_none(SERVICE)


async def test_what_the_cluster_has_forgotten_is_listed_anew(cluster: FakeCluster) -> None:
    say(cluster, {"addresses": ["10.0.0.1"], "conditions": {}}, port=7)
    discovery = Discovery([SERVICE])
    while not await discovery.look():
        await discovery.wait(5)
    cluster.forget()
    say(cluster, {"addresses": ["10.0.0.2"], "conditions": {}}, port=7)
    while await discovery.look() != ["10.0.0.2:7"]:
        await discovery.wait(5)
    await discovery.close()


@pytest.mark.parametrize("answer", [b"<html>busy</html>", b"[]", b"{}", b'{"items": null, "metadata": {}}'])
async def test_an_answer_that_is_not_the_clusters_is_told_and_asked_for_again(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    say(cluster, {"addresses": ["10.0.0.1"], "conditions": {}}, port=7)
    with monkeypatch.context() as meanwhile:  # a proxy's page, say
        meanwhile.setattr(Cluster, "_list", lambda *_, **__: SimpleNamespace(data=answer))
        discovery = Discovery([SERVICE])
        await discovery.look()
        while not discovery.last_error:
            await discovery.wait(5)
            await discovery.look()
    while await discovery.look() != ["10.0.0.1:7"]:
        await discovery.wait(5)
    await discovery.close()


async def test_a_cluster_that_does_not_answer_any_more_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with fake_cluster(tmp_path) as cluster:
        say(cluster, {"addresses": ["10.0.0.1"], "conditions": {}}, port=7)
        discovery = Discovery([SERVICE])
        while not await discovery.look():
            await discovery.wait(5)
    while not discovery.last_error:
        await discovery.wait(5)
        assert await discovery.look() == ["10.0.0.1:7"]
    assert "does not answer" in discovery.last_error
    await discovery.close()
