"""A node, for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.node import apart
from tests.node.api_server import ADMIN, NAMESPACE, ApiServer
from tests.node.machine import DOMAIN, Node
from tests.node.names import Names
from tests.node.pods import Pods, until
from tests.node.release import Release
from tests.system.processes import Processes
from tools.helm_chart.render import Helm


@dataclass(frozen=True, slots=True)
class World:
    """A cluster of one node, as its administrator has it."""

    server: ApiServer
    pods: Pods

    def release(self, name: str, directory: Path, helm: Helm = "helm4") -> Release:
        """One that is not installed yet."""
        return Release(helm, name, directory, self.server.kubeconfig(ADMIN, name))

    def end(self, release: Release) -> None:
        """With all of its pods."""
        release.uninstall()
        until(lambda: not self.pods.of("teacher", release.name))


@pytest.fixture(scope="session", autouse=True)
def loopback() -> None:
    """The API server needs it, with a node or without."""
    if not apart.obstacle():
        apart.raise_loopback()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if reason := apart.obstacle():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("world")
    apart.furnish(directory)
    with Processes() as processes, ExitStack() as stack:
        server = stack.enter_context(closing(ApiServer(processes, directory / "server", address=apart.ADDRESS)))
        server.send({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        stack.enter_context(closing(Node(processes, directory / "node", server)))
        stack.enter_context(Names(stack.enter_context(server.client(ADMIN)), DOMAIN))
        yield World(server, Pods(server.admin))
