"""What a cluster notes of a training job and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdmesh.cluster.client import Cluster
from kdmesh.cluster.kinds import EVENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened, perhaps often."""

    last: str  # RFC 3339
    about: str  # kind and name
    reason: str
    message: str
    count: int
    is_warning: bool

    def sentence(self, age: str) -> str:
        """For a person."""
        often = f" ({self.count} times)" if self.count > 1 else ""
        return f"{age} ago  {'WARNING ' if self.is_warning else ''}{self.reason}{often}  {self.about}: {self.message}"


def find_events(cluster: Cluster, name: str) -> list[Event]:
    """Of the job and everything named after it, the newest last."""
    found = [_event(thing) for thing in cluster.find(EVENT) if _is_about(thing["involvedObject"].get("name", ""), name)]
    return sorted(found, key=lambda event: event.last)


def _is_about(thing: str, name: str) -> bool:
    return thing == name or thing.startswith((f"{name}-node-", f"{name}-0-", f"{name}-output", f"{name}-config"))


def _event(thing: dict[str, Any]) -> Event:
    about = thing["involvedObject"]
    times = (thing.get("lastTimestamp"), thing.get("eventTime"), thing["metadata"].get("creationTimestamp"))
    return Event(
        last=next(time for time in times if time),
        about=f"{about.get('kind', '')} {about.get('name', '')}",
        reason=thing.get("reason", ""),
        message=thing.get("message", ""),
        count=thing.get("count") or 1,
        is_warning=thing.get("type") == "Warning",
    )
