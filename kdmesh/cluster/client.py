"""Speaks to the API server of one cluster, by the `kubernetes` package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from kdmesh.cluster.kinds import KINDS, Kind
from kdmesh.cluster.refusals import Missing, refusal, unreachable
from kdmesh.cluster.watching import Watch
from kdmesh.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_ANSWER_S = 30.0
_SILENCE_S = 600.0  # of a log that is followed, before it is asked for anew
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

Object = dict[str, Any]
"""One object of the cluster, as its API writes it."""


class Cluster:
    """A cluster, and a namespace in it. Its methods block.

    Every method raises ClusterError in a sentence when the cluster does not do what it is asked.

    Args:
        context: of the kubeconfig (KUBECONFIG, or ~/.kube/config); None takes the current one, and in a pod without
            such a file the pod's own service account.
        namespace: None takes the context's.

    Raises:
        ConfigError: the package `kubernetes` is not installed, there is no kubeconfig, or it has no such context.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        self._client, found = _connect(context)
        from kubernetes.client import CoreV1Api, CustomObjectsApi

        self.namespace = namespace or found
        self.server: str = self._client.configuration.host
        self._core = CoreV1Api(self._client)
        self._objects = CustomObjectsApi(self._client)

    def close(self) -> None:
        """Let go of every connection."""
        self._client.close()

    def version(self) -> str:
        """Of Kubernetes."""
        said: str = _read(self._asked_version())["gitVersion"]
        return said

    def clock_skew_s(self) -> float:
        """How far its clock is ahead of ours, to a second and the time that asking takes."""
        theirs = parsedate_to_datetime(self._asked_version().headers["Date"])
        return (theirs - datetime.now(UTC)).total_seconds() + 0.5  # the header leaves fractions out

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Versions of every group of objects that it serves, but for the core."""
        from kubernetes.client import ApisApi

        with self._told("list the kinds of objects"):
            raw = ApisApi(self._client).get_api_versions(_preload_content=False, _request_timeout=_ANSWER_S)
            found = _read(raw)["groups"]
        return {group["name"]: tuple(one["version"] for one in group["versions"]) for group in found}

    def may(self, verb: str, kind: Kind) -> bool:
        """Whether our account may do that in the namespace."""
        from kubernetes.client import AuthorizationV1Api

        wanted = {"namespace": self.namespace, "verb": verb, "group": kind.group, "resource": kind.plural}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": wanted},
        }
        with self._told(f"ask whether you may {verb} {kind.plural}"):
            review = AuthorizationV1Api(self._client).create_self_subject_access_review
            allowed: bool = _read(review(body, _preload_content=False, _request_timeout=_ANSWER_S))["status"]["allowed"]
            return allowed

    def serves(self, kind: Kind) -> bool:
        """Whether the cluster knows objects of this kind."""
        try:
            with self._told(f"look for {kind.plural}"):
                raw = self._objects.get_api_resources(
                    kind.group, kind.version, _preload_content=False, _request_timeout=_ANSWER_S
                )
                return any(resource["name"] == kind.plural for resource in _read(raw)["resources"])
        except Missing:
            return False

    def create(self, manifest: Mapping[str, Any]) -> Object:
        """The object as it was stored. Raises AlreadyExists, too."""
        kind = KINDS[manifest["kind"]]
        with self._told(f"create {kind.name} {manifest['metadata']['name']}", kind):
            where = {"body": dict(manifest), "_preload_content": False, "_request_timeout": _ANSWER_S}
            if kind.group:
                made = self._objects.create_namespaced_custom_object(
                    kind.group, kind.version, self.namespace, kind.plural, **where
                )
            else:
                made = getattr(self._core, f"create_namespaced_{_snake(kind)}")(self.namespace, **where)
            return _read(made)

    def patch(self, kind: Kind, name: str, change: Mapping[str, Any]) -> None:
        """Merge `change` into an object."""
        with self._told(f"change {kind.name} {name}", kind):
            where = {"_content_type": "application/merge-patch+json", "_request_timeout": _ANSWER_S}
            if kind.group:
                self._objects.patch_namespaced_custom_object(
                    kind.group, kind.version, self.namespace, kind.plural, name, dict(change), **where
                )
            else:
                patch = getattr(self._core, f"patch_namespaced_{_snake(kind)}")
                patch(name, self.namespace, dict(change), _preload_content=False, **where)

    def get(self, kind: Kind, name: str) -> Object | None:
        """One object; None where there is none."""
        found = [one for one in self.find(kind, fields=f"metadata.name={name}") if one["metadata"]["name"] == name]
        return found[0] if found else None

    def find(self, kind: Kind, *, labels: str = "", fields: str = "", everywhere: bool = False) -> list[Object]:
        """Those that fit, of this namespace or of all."""
        with self._told(f"list {kind.plural}", kind):
            items: list[Object] = _read(self._list(kind, labels, fields, everywhere=everywhere))["items"]
            return items

    def delete(self, kind: Kind, name: str) -> bool:
        """Ask for the end of an object and of what it owns; whether it was there."""
        try:
            with self._told(f"delete {kind.name} {name}", kind):
                how = {"propagation_policy": "Background", "_preload_content": False, "_request_timeout": _ANSWER_S}
                if kind.group:
                    self._objects.delete_namespaced_custom_object(
                        kind.group, kind.version, self.namespace, kind.plural, name, **how
                    )
                else:
                    getattr(self._core, f"delete_namespaced_{_snake(kind)}")(name, self.namespace, **how)
        except Missing:
            return False
        return True

    def watch(self, kind: Kind, *, labels: str, since: str, seconds: int) -> Watch:
        """Changes after the resource version `since`, for so long at most."""
        with self._told(f"watch {kind.plural}", kind):
            return Watch(self._list(kind, labels, "", watch=True, resource_version=since, timeout_seconds=seconds))

    def snapshot(self, kind: Kind, *, labels: str) -> tuple[list[Object], str]:
        """Those that fit, and the resource version to watch from."""
        with self._told(f"list {kind.plural}", kind):
            found = _read(self._list(kind, labels, ""))
            return found["items"], found["metadata"]["resourceVersion"]

    @contextmanager
    def log(
        self, pod: str, *, follow: bool, tail: int | None = None, timestamps: bool = False
    ) -> Iterator[Iterator[str]]:
        """The lines that a pod's container has written, and with `follow` those that it goes on to write.

        They end where the connection does, and begin where the machine's last file of them does.

        Args:
            timestamps: have before each line when it was written, RFC 3339, and a space.
        """
        with self._told(f"read the log of pod {pod}"):
            raw = self._core.read_namespaced_pod_log(
                pod,
                self.namespace,
                follow=follow,
                timestamps=timestamps,
                **({} if tail is None else {"tail_lines": tail}),
                _preload_content=False,
                _request_timeout=(_ANSWER_S, _SILENCE_S) if follow else _ANSWER_S,
            )
            try:
                yield _lines(raw.stream(2**16))
            finally:
                raw.close()

    def _list(self, kind: Kind, labels: str, fields: str, *, everywhere: bool = False, **more: Any) -> Any:
        timeout = (_ANSWER_S, more["timeout_seconds"] + _ANSWER_S) if "watch" in more else _ANSWER_S
        chosen = {"label_selector": labels, "field_selector": fields}
        options = {key: value for key, value in chosen.items() if value} | more
        options |= {"_preload_content": False, "_request_timeout": timeout}
        if kind.group and (everywhere or not kind.is_namespaced):
            return self._objects.list_custom_object_for_all_namespaces(kind.group, kind.version, kind.plural, **options)
        if kind.group:
            return self._objects.list_namespaced_custom_object(
                kind.group, kind.version, self.namespace, kind.plural, **options
            )
        if not kind.is_namespaced:
            return getattr(self._core, f"list_{_snake(kind)}")(**options)
        if everywhere:
            return getattr(self._core, f"list_{_snake(kind)}_for_all_namespaces")(**options)
        return getattr(self._core, f"list_namespaced_{_snake(kind)}")(self.namespace, **options)

    def _asked_version(self) -> Any:
        from kubernetes.client import VersionApi

        with self._told("read the version"):
            raw = VersionApi(self._client).get_code(_preload_content=False, _request_timeout=_ANSWER_S)
            assert raw.data
            return raw

    @contextmanager
    def _told(self, what: str, kind: Kind | None = None) -> Iterator[None]:
        """Turn what the package raises into our errors."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            raise refusal(error.status, error.body, what, namespace=self.namespace, kind=kind) from None
        except HTTPError as error:
            raise unreachable(self.server, error) from None


def _connect(context: str | None) -> tuple[ApiClient, str]:
    """A client, and the namespace to use."""
    try:
        from kubernetes import client, config
    except ImportError:
        raise ConfigError("the package kubernetes is not installed: pip install 'kdmesh[kubernetes]'") from None
    configuration = client.Configuration()
    file = os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")  # as it is where there is no home
    has_file = any(Path(one).is_file() for one in file.split(os.pathsep))
    try:
        if not has_file and context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(configuration)
            configuration.proxy = None  # one from the environment does not lead to the pod's own cluster
            namespace = (_SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        elif not has_file:
            raise ConfigError(f"there is no kubeconfig {file}: set KUBECONFIG to the file that your cluster gave you")
        else:
            namespace = _namespace(config.list_kube_config_contexts(file), context, file)
            config.load_kube_config(file, context, client_configuration=configuration)
    except (config.ConfigException, OSError, YAMLError, ValueError, TypeError) as error:  # the last three: damaged
        raise ConfigError(f"the cluster cannot be reached as {file} says: {error}") from None
    configuration.retries = 0
    return client.ApiClient(configuration), namespace


def _namespace(found: tuple[list[Object], Object], context: str | None, file: str) -> str:
    """Of a context that there is."""
    contexts, current = found
    if context is None:
        chosen = current
    else:
        by_name = {one["name"]: one for one in contexts}
        if context not in by_name:
            raise ConfigError(f"{file} has no context {context!r}; it has {', '.join(sorted(by_name))}")
        chosen = by_name[context]
    namespace: str = chosen["context"].get("namespace") or "default"
    return namespace


def _snake(kind: Kind) -> str:
    """ConfigMap -> config_map, as the package names its methods."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind.name).lstrip("_")


def _read(raw: Any) -> Object:
    """Raises ClusterError where somebody else answered, a proxy for example."""
    try:
        read = json.loads(raw.data)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise ClusterError(f"the cluster's answer is no JSON object: {raw.data[:80]!r}")
    return read


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Whole lines without their ends; what follows the last end of a line comes last."""
    from urllib3.exceptions import HTTPError

    rest = b""
    with suppress(HTTPError):
        for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line.decode("utf-8", "replace") for line in lines)
    if rest:
        yield rest.decode("utf-8", "replace")
