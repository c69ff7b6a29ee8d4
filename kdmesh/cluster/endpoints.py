"""The servers behind one service of the cluster, as its EndpointSlices say while they change."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from kdmesh.cluster.client import Cluster
from kdmesh.cluster.kinds import ENDPOINT_SLICE
from kdmesh.cluster.watching import Watch
from kdmesh.errors import KdmeshError

log = logging.getLogger(__name__)

SCHEME = "k8s:///"
_ADDRESS = re.compile(r"k8s:///([a-z0-9-]+)(?:\.([a-z0-9-]+))?:([a-z0-9-]+)")
_LONGEST_WATCH_S = 240
_PAUSE_S = 0.2  # between two watches, in case the server ends each at once
_AGAIN_S = 2.0  # after a failure
_MALFORMED = (KeyError, TypeError, AttributeError, ValueError)  # of an answer that has not the parts it should have
_END_S = 5.0  # that a thread has to end, before it is left to end with the process


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What an address k8s:///service.namespace:port names."""

    name: str
    namespace: str | None  # None: this process's
    port: str  # the name that the service gives it, or its number at the servers

    @classmethod
    def parse(cls, address: str) -> Service:
        """Raises ValueError for what is of another form."""
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise ValueError(f"{address!r} is not of the form k8s:///service:port or k8s:///service.namespace:port")
        name, namespace, port = match.groups()
        return cls(name=name, namespace=namespace or os.environ.get("KDMESH_NAMESPACE"), port=port)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One server that takes requests."""

    address: str  # host:port
    machine: str  # the cluster's name of the node that it runs on; empty where it has none


class ServiceWatch:
    """Keeps to the ready servers of a service, in a thread of its own, until closed.

    A cluster that does not answer changes nothing: what was found before stays.

    Attributes:
        found: None until the cluster has answered.
        error: why nothing could be found the last time; empty when all is well.
    """

    def __init__(self, service: Service, on_change: Callable[[], None]) -> None:
        """Start looking.

        Args:
            on_change: called in that thread after `found` or `error` has changed.
        """
        self.found: tuple[Endpoint, ...] | None = None
        self.error = ""
        self._service = service
        self._on_change = on_change
        self._is_closed = threading.Event()
        self._watch: Watch | None = None
        self._thread = threading.Thread(target=self._run, name=f"watch {service.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. Blocks shortly."""
        self._is_closed.set()
        if (watch := self._watch) is not None:
            watch.close()
        self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._is_closed.is_set():
            try:
                with closing(Cluster(namespace=self._service.namespace)) as cluster:
                    while not self._is_closed.is_set():
                        self._follow(cluster)
            except (KdmeshError, *_MALFORMED) as error:
                if self.error != str(error):
                    log.warning("service not found", extra={"sought": self._service.name, "reason": str(error)})
                    self.error = str(error)
                    self._on_change()
            self._is_closed.wait(_AGAIN_S)

    def _follow(self, cluster: Cluster) -> None:
        """List, then watch until the cluster has forgotten where we were. Raises ClusterError."""
        labels = f"kubernetes.io/service-name={self._service.name}"
        listed, since = cluster.snapshot(ENDPOINT_SLICE, labels=labels)
        slices = {thing["metadata"]["name"]: thing for thing in listed}
        self._tell(cluster, slices.values())
        while not self._is_closed.is_set():
            self._watch = cluster.watch(ENDPOINT_SLICE, labels=labels, since=since, seconds=_LONGEST_WATCH_S)
            if self._is_closed.is_set():  # before close could see it
                self._watch.close()
            for change in self._watch:
                if change.kind == "ERROR":
                    return
                metadata = change.thing["metadata"]
                since = metadata["resourceVersion"]
                if change.kind == "DELETED":
                    slices.pop(metadata["name"], None)
                else:
                    slices[metadata["name"]] = change.thing
                self._tell(cluster, slices.values())
            self._is_closed.wait(_PAUSE_S)

    def _tell(self, cluster: Cluster, slices: Iterable[dict[str, Any]]) -> None:
        slices = list(slices)
        found = tuple(dict.fromkeys(endpoint for one in slices for endpoint in _ready(one, self._service.port)))
        error = "" if found else _why_none(self._service, cluster.namespace, slices)
        if (found, error) != (self.found, self.error):
            self.found, self.error = found, error
            self._on_change()


def _ready(one: dict[str, Any], port: str) -> Iterator[Endpoint]:
    """The servers of a slice that are ready, and not about to end."""
    number = next((number for name, number in _ports(one) if port in (name, number)), None)
    if number is None:
        return
    for endpoint in one.get("endpoints") or ():
        if endpoint.get("conditions", {}).get("ready", True):
            host = endpoint["addresses"][0]
            host = f"[{host}]" if one["addressType"] == "IPv6" else host
            yield Endpoint(address=f"{host}:{number}", machine=endpoint.get("nodeName") or "")


def _ports(one: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and number of each."""
    return [(port.get("name") or "", str(port["port"])) for port in one.get("ports") or ()]


def _why_none(service: Service, namespace: str, slices: list[dict[str, Any]]) -> str:
    where = f"the service {service.name} in namespace {namespace}"
    ports = {port for one in slices for port in _ports(one)}
    if not slices:
        return f"namespace {namespace} has no service {service.name}, or it selects no pod"
    if ports and not any(service.port in port for port in ports):
        known = ", ".join(sorted(f"{name} ({number})".strip() for name, number in ports))
        return f"{where} has no port {service.port}; it has {known}"
    return f"no server of {where} is ready"
