"""What a test asks about pods of the node, and does to them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import httpx

from tests.node.api_server import NAMESPACE

Object = dict[str, Any]

_PATIENCE_S = 300.0
_LOOK_S = 0.2
_BASE = f"/api/v1/namespaces/{NAMESPACE}"


class Pods:
    """Those of the namespace."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def of(self, component: str, release: str) -> list[Object]:
        """By name; those that are ending as well."""
        labels = f"app.kubernetes.io/component={component},app.kubernetes.io/instance={release}"
        found: list[Object] = self._asked("GET", "pods", params={"labelSelector": labels})["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))

    def get(self, name: str) -> Object | None:
        """None: there is none of this name."""
        answer = self._client.get(f"{_BASE}/pods/{name}")
        return None if answer.status_code == 404 else dict(answer.json())

    def create(self, manifest: Object, kind: str = "pods") -> None:
        """An object of the core."""
        self._asked("POST", kind, json=manifest)

    def delete(self, name: str, kind: str = "pods") -> None:
        """It may still be there for its grace."""
        self._asked("DELETE", f"{kind}/{name}")

    def evict(self, name: str) -> tuple[int, str]:
        """As a drain of its node asks it: the status, and what is said against it."""
        metadata = {"name": name, "namespace": NAMESPACE}
        asked = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": metadata}
        answer = self._client.post(f"{_BASE}/pods/{name}/eviction", json=asked)
        return answer.status_code, str(answer.json().get("message", ""))

    def log(self, name: str, **more: str) -> str:
        """What its container said."""
        answer = self._client.get(f"{_BASE}/pods/{name}/log", params=more)
        assert answer.status_code == 200, answer.text
        return answer.text

    def events(self, name: str, event: str) -> list[Object]:
        """The lines of its log that say `event`."""
        return events(self.log(name).splitlines(), event)

    def ready_addresses(self, service: str) -> set[str]:
        """That the Service has."""
        subsets = self._asked("GET", f"endpoints/{service}").get("subsets", ())
        return {one["ip"] for subset in subsets for one in subset.get("addresses", ())}

    def until_gone(self, name: str, log: list[str]) -> list[Object]:
        """Return when it is: all that it was from when it had to end. `log` is filled with what its container said."""
        asked = {"fieldSelector": f"metadata.name={name}", "watch": "true"}
        following = threading.Thread(target=self._follow, args=(name, log), name="log")
        following.start()
        seen: list[Object] = []
        with self._client.stream("GET", f"{_BASE}/pods", params=asked, timeout=_PATIENCE_S) as changes:
            for change in map(json.loads, changes.iter_lines()):
                if change["type"] == "DELETED":
                    break
                seen.append(change["object"])
        following.join()
        return [one for one in seen if "deletionTimestamp" in one["metadata"]]

    def _follow(self, name: str, log: list[str]) -> None:
        asked = {"follow": "true"}
        with self._client.stream("GET", f"{_BASE}/pods/{name}/log", params=asked, timeout=_PATIENCE_S) as lines:
            log.extend(lines.iter_lines())

    def _asked(self, method: str, path: str, **more: Any) -> Object:
        answer = self._client.request(method, f"{_BASE}/{path}", **more)
        assert answer.is_success, answer.text
        return dict(answer.json())


def events(log: Iterable[str], event: str) -> list[Object]:
    """The lines that say `event`."""
    found = [json.loads(line) for line in log if line.startswith("{")]
    return [line for line in found if line["event"] == event]


def is_ready(pod: Object) -> bool:
    """And not ending."""
    conditions = pod["status"].get("conditions", ())
    holds = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return holds and "deletionTimestamp" not in pod["metadata"]


def at_s(time_of: str) -> float:
    """A time of the API server or of a log, in seconds."""
    return datetime.fromisoformat(time_of).timestamp()


def until(is_so: Callable[[], object], *, within_s: float = _PATIENCE_S) -> None:
    """Return when it is so."""
    deadline_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"it was not so within {within_s} s"
        time.sleep(_LOOK_S)
