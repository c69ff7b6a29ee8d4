"""An API server that speaks enough of Kubernetes over real HTTP, and holds what it is given against the schemas.

It has no controllers: a test says what becomes of pods and jobs.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.support.certificates import Pair
from tests.support.cluster_schemas import problems

Object = dict[str, Any]

TOKEN = "a-token-of-this-test"
_BUILT_IN = {
    "batch/v1": ["jobs"],
    "discovery.k8s.io/v1": ["endpointslices"],
    "storage.k8s.io/v1": ["storageclasses"],
}
JOB_SETS = {"jobset.x-k8s.io/v1alpha2": ["jobsets"]}
TRAINER = {"trainer.kubeflow.org/v1alpha1": ["trainjobs", "trainingruntimes"]}


class Refused(Exception):
    """An answer that is no success: a Status object, or plain text where the path leads nowhere."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
        self.status |= {"message": message, "details": details}


class NoSuchPath(Refused):
    """As the API server answers for a group that nobody has installed."""

    def __init__(self) -> None:
        super().__init__(404, "", "404 page not found")


@dataclass(kw_only=True)
class FakeCluster:
    """What the server holds; every method may be called while it serves.

    Attributes:
        forbidden: (verb, plural) that the caller's account may not.
        quotas: plural -> what the quota says when one is created.
        requests: method and path of everything that was asked.
        logs: lines by pod, each after its time.
        unreadable: why a pod's log cannot be had, by pod.
    """

    served: Mapping[str, list[str]]
    namespaces: set[str] = field(default_factory=lambda: {"default", "ml"})
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    quotas: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    version: int = 1
    oldest: int = 0  # changes up to this version are forgotten
    address: str = ""
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self._watches_since = 0
        self._rotated: dict[str, int] = {}  # how often a pod's log was
        self._objects: dict[tuple[str, str, str], Object] = {}  # by plural, namespace, name
        self._changes: list[tuple[int, str, str, Object]] = []  # version, plural, kind of change, object

    # What tests do

    def put(self, plural: str, thing: Mapping[str, Any], namespace: str = "ml") -> Object:
        """Store an object, new or changed, as a controller does: nobody is asked whether that may be."""
        with self.changed:
            return self._store(plural, namespace, json.loads(json.dumps(thing)))

    def get(self, plural: str, name: str, namespace: str = "ml") -> Object:
        """One that is there."""
        return self._objects[plural, namespace, name]

    def names(self, plural: str, namespace: str = "ml") -> list[str]:
        """Of all that are there."""
        return sorted(name for kind, place, name in self._objects if (kind, place) == (plural, namespace))

    def remove(self, plural: str, name: str, namespace: str = "ml") -> None:
        """Delete an object, and what it owns."""
        with self.changed:
            self._delete(plural, namespace, name)

    def set_status(self, plural: str, name: str, status: Mapping[str, Any], namespace: str = "ml") -> None:
        """As a controller does."""
        self.put(plural, {**self.get(plural, name, namespace), "status": dict(status)}, namespace)

    def say(self, pod: str, *lines: str) -> None:
        """A pod writes to its log."""
        with self.changed:
            for line in lines:
                self.version += 1
                time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(milliseconds=self.version)
                self.logs.setdefault(pod, []).append(f"{time:%Y-%m-%dT%H:%M:%S.%f}000Z {line}")
            self.changed.notify_all()

    def rotate(self, pod: str) -> None:
        """Put what a pod has written into another file, which nobody reads; whoever follows is cut off."""
        with self.changed:
            self.logs[pod] = []
            self._rotated[pod] = self._rotated.get(pod, 0) + 1
            self.changed.notify_all()

    def forget(self) -> None:
        """End every watch, and forget all changes until now."""
        with self.changed:
            self.version += 1
            self.oldest = self.version
            self._watches_since = self.version
            self.changed.notify_all()

    def num_asked(self, method: str, ending: str) -> int:
        """How often a path with this ending was asked for."""
        return sum(one == method and path.endswith(ending) for one, path in self.requests)

    # What the server does

    def create(self, plural: str, namespace: str, thing: Object) -> Object:
        """Store a new object. Raises Refused."""
        self.check(namespace, "create", plural)
        if plural in self.quotas:
            name = thing["metadata"]["name"]
            raise Refused(403, "Forbidden", f'{plural} "{name}" is forbidden: exceeded quota: {self.quotas[plural]}')
        if wrong := problems(thing):
            causes = [dict(zip(("field", "message"), line.split(": ", 1), strict=True)) for line in wrong]
            raise Refused(422, "Invalid", f"{thing['kind']} is invalid: {'; '.join(wrong)}", causes=causes)
        with self.changed:
            name = thing["metadata"]["name"]
            if (plural, namespace, name) in self._objects:
                raise Refused(409, "AlreadyExists", f'{plural} "{name}" already exists', name=name, kind=plural)
            return self._store(plural, namespace, thing)

    def patch(self, plural: str, namespace: str, name: str, change: Object) -> Object:
        """Merge into an object. Raises Refused."""
        self.check(namespace, "patch", plural)
        with self.changed:
            old = self._objects.get((plural, namespace, name))
            if old is None:
                raise _not_found(plural, name)
            return self._store(plural, namespace, _merged(old, change))

    def delete(self, plural: str, namespace: str, name: str) -> None:
        """Delete an object, and what it owns. Raises Refused."""
        self.check(namespace, "delete", plural)
        with self.changed:
            if (plural, namespace, name) not in self._objects:
                raise _not_found(plural, name)
            self._delete(plural, namespace, name)

    def find(self, plural: str, namespace: str | None, query: Mapping[str, str]) -> list[Object]:
        """Those that the selectors choose; of all namespaces for None. Raises Refused."""
        self.check(namespace, "list", plural)
        with self.changed:
            found = [
                o for (kind, where, _), o in self._objects.items() if kind == plural and namespace in (None, where)
            ]
        return [one for one in found if _is_chosen(one, query)]

    def watch(self, plural: str, namespace: str | None, query: Mapping[str, str]) -> Iterator[Object]:
        """Changes since a version, as they come, until the time is up."""
        since, until = int(query.get("resourceVersion", 0)), time.monotonic() + float(query["timeoutSeconds"])
        if since < self.oldest:
            yield {"type": "ERROR", "object": Refused(410, "Expired", "too old resource version").status}
            return
        begun = self._watches_since
        while not self.is_closed and begun == self._watches_since:
            with self.changed:
                fresh = [one for one in self._changes if one[0] > since and one[1] == plural]
                if not fresh:
                    if time.monotonic() >= until:
                        return
                    self.changed.wait(min(0.5, max(0.0, until - time.monotonic())))
                    continue
            since = fresh[-1][0]
            for _, _, kind, thing in fresh:
                if namespace in (None, thing["metadata"]["namespace"]) and _is_chosen(thing, query):
                    yield {"type": kind, "object": thing}

    def log(self, namespace: str, pod: str, query: Mapping[str, str]) -> Iterator[str]:
        """Lines, with `follow` until the pod has ended. Raises Refused."""
        self.check(namespace, "get", "pods/log")
        if ("pods", namespace, pod) not in self._objects:
            raise _not_found("pods", pod)
        if pod in self.unreadable:
            raise Refused(500, "InternalError", self.unreadable[pod])
        return self._lines(namespace, pod, query)

    def _lines(self, namespace: str, pod: str, query: Mapping[str, str]) -> Iterator[str]:
        told, begun = 0, self._rotated.get(pod)
        if "tailLines" in query:
            told = max(0, len(self.logs.get(pod, [])) - int(query["tailLines"]))
        while True:
            with self.changed:
                lines = self.logs.get(pod, [])[told:]
                thing = self._objects.get(("pods", namespace, pod))
                is_over = thing is None or thing["status"]["phase"] in ("Succeeded", "Failed") or self.is_closed
                is_over |= self._rotated.get(pod) != begun
                if not lines and not is_over and query.get("follow") == "true":
                    self.changed.wait(0.5)
                    continue
            told += len(lines)
            yield from (
                lines if query.get("timestamps") in ("true", "True") else (one.partition(" ")[2] for one in lines)
            )
            if is_over or query.get("follow") != "true":
                return

    def groups(self) -> list[Object]:
        """As the API lists them."""
        pairs = [name.split("/") for name in self.served]
        return [{"name": group, "versions": [{"version": version}]} for group, version in pairs]

    def check(self, namespace: str | None, verb: str, plural: str) -> None:
        """Raises Refused for what the account may not, and for a namespace that there is not."""
        if (verb, plural) in self.forbidden:
            raise Refused(
                403,
                "Forbidden",
                f'{plural} is forbidden: User "ann" cannot {verb} resource "{plural}" in the namespace "{namespace}"',
            )
        if namespace is not None and namespace not in self.namespaces and verb == "create":
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found', name=namespace, kind="namespaces")

    def _store(self, plural: str, namespace: str, thing: Object) -> Object:
        metadata = thing["metadata"]
        key = plural, namespace, metadata["name"]
        self.version += 1
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        metadata |= {"namespace": namespace, "resourceVersion": str(self.version)}
        self._note("MODIFIED" if key in self._objects else "ADDED", plural, thing)
        self._objects[key] = thing
        return thing

    def _delete(self, plural: str, namespace: str, name: str) -> None:
        gone = self._objects.pop((plural, namespace, name))
        self.version += 1
        self._note("DELETED", plural, gone)
        for (kind, place, owned), thing in list(self._objects.items()):
            owners = thing["metadata"].get("ownerReferences", ())
            if place == namespace and any(one["uid"] == gone["metadata"]["uid"] for one in owners):
                self._delete(kind, place, owned)

    def _note(self, change: str, plural: str, thing: Object) -> None:
        self._changes.append((self.version, plural, change, json.loads(json.dumps(thing))))
        self.changed.notify_all()


class _Server(ThreadingHTTPServer):
    """Does not mind that a client goes."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Of one connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def fake_cluster(
    directory: Path, *, served: Mapping[str, list[str]] | None = None, certificate: Pair | None = None
) -> Iterator[FakeCluster]:
    """A server with a kubeconfig in `directory`/kubeconfig, of the contexts here (namespace ml) and other (default)."""
    wanted = {**JOB_SETS, **TRAINER} if served is None else served
    cluster = FakeCluster(served={**_BUILT_IN, **wanted})
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": cluster}))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.cert, certificate.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    cluster.address = f"http{'' if certificate is None else 's'}://127.0.0.1:{server.server_address[1]}"
    write_kubeconfig(directory / "kubeconfig", cluster.address)
    try:
        yield cluster
    finally:
        with cluster.changed:
            cluster.is_closed = True
            cluster.changed.notify_all()
        server.shutdown()
        server.server_close()
        thread.join()


def write_kubeconfig(path: Path, address: str, *, token: str = TOKEN) -> None:
    """As `kubectl` reads it."""
    contexts = [
        {"name": "here", "context": {"cluster": "c", "user": "ann", "namespace": "ml"}},
        {"name": "other", "context": {"cluster": "c", "user": "ann"}},
    ]
    tree = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "users": [{"name": "ann", "user": {"token": token}}],
        "contexts": contexts,
        "current-context": "here",
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")


class _Handler(BaseHTTPRequestHandler):
    """Answers on one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    cluster: FakeCluster

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def answer(self) -> None:
        """Any method."""
        self.close_connection |= self.cluster.is_closed
        url = urlsplit(self.path)
        self.cluster.requests.append((self.command, url.path))
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else {}
        try:
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            if (scheme.lower(), token) != ("bearer", TOKEN):
                raise Refused(401, "Unauthorized", "Unauthorized")
            self.route(url.path.strip("/").split("/"), query, body)
        except NoSuchPath as refused:
            self.send(str(refused).encode(), code=404, kind="text/plain")
        except Refused as refused:
            self.send(json.dumps(refused.status).encode(), code=refused.code)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PATCH = do_DELETE = answer

    def route(self, parts: list[str], query: Mapping[str, str], body: Object) -> None:
        """By what the path names."""
        match parts:
            case ["version"]:
                number = {"major": "1", "minor": "34", "gitVersion": "v1.34.5", "gitCommit": "", "goVersion": ""}
                more = {"gitTreeState": "", "buildDate": "", "compiler": "", "platform": ""}
                self.send(json.dumps({**number, **more}).encode())
            case ["api", "v1", *rest]:
                self.resource(rest, query, body)
            case ["apis"]:
                self.send(json.dumps({"kind": "APIGroupList", "groups": self.cluster.groups()}).encode())
            case ["apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews"]:
                asked = body["spec"]["resourceAttributes"]
                may = (asked["verb"], asked["resource"]) not in self.cluster.forbidden
                self.send(json.dumps({**body, "status": {"allowed": may}}).encode(), code=201)
            case ["apis", group, version] if f"{group}/{version}" in self.cluster.served:
                resources = [
                    {"name": plural, "namespaced": True} for plural in self.cluster.served[f"{group}/{version}"]
                ]
                self.send(json.dumps({"kind": "APIResourceList", "resources": resources}).encode())
            case ["apis", group, version, *rest] if f"{group}/{version}" in self.cluster.served:
                self.resource(rest, query, body)
            case _:
                raise NoSuchPath

    def resource(self, parts: list[str], query: Mapping[str, str], body: Object) -> None:
        match [self.command, *parts]:
            case ["GET", plural]:
                self.several(plural, None, query)
            case ["GET", "namespaces", namespace, plural]:
                self.several(plural, namespace, query)
            case ["GET", "namespaces", namespace, "pods", pod, "log"]:
                lines = self.cluster.log(namespace, pod, query)
                self.stream(f"{line}\n".encode() for line in lines)
            case ["POST", "namespaces", namespace, plural]:
                self.send(json.dumps(self.cluster.create(plural, namespace, body)).encode(), code=201)
            case ["PATCH", "namespaces", namespace, plural, name]:
                self.send(json.dumps(self.cluster.patch(plural, namespace, name, body)).encode())
            case ["DELETE", "namespaces", namespace, plural, name]:
                self.cluster.delete(plural, namespace, name)
                self.send(json.dumps({"kind": "Status", "status": "Success"}).encode())
            case _:
                raise NoSuchPath

    def several(self, plural: str, namespace: str | None, query: Mapping[str, str]) -> None:
        if query.get("watch") in ("true", "True", "1"):
            self.cluster.check(namespace, "watch", plural)
            changes = self.cluster.watch(plural, namespace, query)
            self.stream(f"{json.dumps(change)}\n".encode() for change in changes)
            return
        found = self.cluster.find(plural, namespace, query)
        said = {"kind": "List", "metadata": {"resourceVersion": str(self.cluster.version)}, "items": found}
        self.send(json.dumps(said).encode())

    def send(self, body: bytes, *, code: int = 200, kind: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, chunks: Iterator[bytes]) -> None:
        """Each as it comes."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


def _not_found(plural: str, name: str) -> Refused:
    return Refused(404, "NotFound", f'{plural} "{name}" not found', name=name, kind=plural)


def _is_chosen(thing: Object, query: Mapping[str, str]) -> bool:
    labels = thing["metadata"].get("labels", {})
    wanted = dict(pair.split("=", 1) for pair in query.get("labelSelector", "").split(",") if pair)
    fields = dict(pair.split("=", 1) for pair in query.get("fieldSelector", "").split(",") if pair)
    assert fields.keys() <= {"metadata.name"}, f"this server knows no other field: {fields}"
    is_named = fields.get("metadata.name") in (None, thing["metadata"]["name"])
    return is_named and all(labels.get(key) == value for key, value in wanted.items())


def _merged(old: Any, change: Any) -> Any:
    """JSON merge patch."""
    if not isinstance(change, dict) or not isinstance(old, dict):
        return change
    merged = dict(old)
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(old.get(key), value)
    return merged
