"""Servers behind a service of the fake cluster, as its controllers would say while pods come and go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.fake_cluster import FakeCluster, fake_cluster


@contextmanager
def own_cluster(directory: Path) -> Iterator[FakeCluster]:
    """A cluster that every process finds which is started meanwhile."""
    with pytest.MonkeyPatch.context() as patch, fake_cluster(directory) as running:
        patch.setenv("KUBECONFIG", str(directory / "kubeconfig"))
        yield running


def announce(cluster: FakeCluster, service: str, address: str, *, machine: str = "machine-0") -> None:
    """A server is ready, at the port named grpc of a service in the namespace ml."""
    host, _, port = address.rpartition(":")
    metadata = {"name": _slice(service, address), "labels": {"kubernetes.io/service-name": service}}
    endpoint = {"addresses": [host], "conditions": {"ready": True}, "nodeName": machine}
    ports = [{"name": "grpc", "port": int(port)}]
    cluster.put(
        "endpointslices", {"metadata": metadata, "addressType": "IPv4", "ports": ports, "endpoints": [endpoint]}
    )


def withdraw(cluster: FakeCluster, service: str, address: str) -> None:
    """It is not ready any more, as every pod that is to end."""
    cluster.remove("endpointslices", _slice(service, address))


def _slice(service: str, address: str) -> str:
    """The tests' servers differ by their ports, which all endpoints of a slice share: each has a slice of its own."""
    return f"{service}-{address.rpartition(':')[2]}"
