"""What an API server's refusals mean, in sentences that say what to do."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from kdmesh.cluster.kinds import Kind
from kdmesh.errors import ClusterError


class Missing(ClusterError):
    """There is no such object, namespace or kind."""


class AlreadyExists(ClusterError):
    """There is an object of that name."""


class Forbidden(ClusterError):
    """Our account may not, or is not known."""


def unreachable(server: str, error: Exception) -> ClusterError:
    """Nobody answers there."""
    reason = getattr(error, "reason", None) or error
    return ClusterError(f"the cluster at {server} does not answer: {reason}")


def refusal(
    status: int | None, body: str | None, what: str, *, namespace: str, kind: Kind | None = None
) -> ClusterError:
    """The error for an answer of the API server.

    Args:
        status: of HTTP.
        body: a Status object, or whatever stands between us and the server said.
        what: was asked for, after "cannot".
        kind: of the object.
    """
    said = _status(body)
    message = said.get("message") or (body or "").strip() or f"HTTP status {status}"
    start = f"cannot {what} in namespace {namespace}"
    match status:
        case 401:
            return Forbidden(f"{start}: the cluster does not know who you are; log in to it again")
        case 403:
            return Forbidden(f"{start}: {_forbidden(message)}")
        case 404 if said.get("details", {}).get("kind") == "namespaces" or f'namespaces "{namespace}"' in message:
            return Missing(f"{start}: there is no such namespace")
        case 404 if kind is not None and kind.project and "details" not in said:
            return Missing(f"{start}: the cluster has no {kind.name}; {kind.project} is not installed there")
        case 404:
            return Missing(f"{start}: there is none")
        case 409 if said.get("reason") == "AlreadyExists":
            return AlreadyExists(f"{start}: it exists already")
        case 400 | 422:
            return ClusterError(f"{start}: the cluster finds it wrong: {_causes(said) or message}")
        case _:
            return ClusterError(f"{start}: {message}")


def _forbidden(message: str) -> str:
    if "exceeded quota" in message:
        return f"the namespace's quota is used up: {message.partition('exceeded quota: ')[2]}"
    if "is being terminated" in message:
        return "the namespace is being deleted"
    if "cannot" in message:
        return f"your account may not: {message}"
    # An admission plugin or webhook, as of Pod Security or a policy.
    return f"the cluster's policies forbid it: {message}"


def _status(body: str | None) -> dict[str, Any]:
    with suppress(ValueError):
        said = json.loads(body or "")
        if isinstance(said, dict):
            return said
    return {}


def _causes(said: dict[str, Any]) -> str:
    causes = said.get("details", {}).get("causes", ())
    return "; ".join(f"{cause.get('field', '')}: {cause.get('message', '')}" for cause in causes)
