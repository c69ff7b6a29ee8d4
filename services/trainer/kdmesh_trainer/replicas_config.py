"""What the trainer can be told about several servers of one model."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from kdmesh.config import StrictModel

_NAME = re.compile(r"dns:///[^:/\s]+:[0-9]+")
_SERVICE = re.compile(r"k8s:///[a-z0-9-]+(\.[a-z0-9-]+)?:[a-z0-9-]+")


def _address(value: str) -> str:
    if value.startswith("dns:") and not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not of the form dns:///name:port")
    if value.startswith("k8s:") and not _SERVICE.fullmatch(value):
        raise ValueError(f"{value!r} is not of the form k8s:///service:port or k8s:///service.namespace:port")
    return value


class RoutingConfig(StrictModel):
    """Which of several teachers gets a request."""

    local_tokens: int = Field(8192, ge=0)
    """Tokens more that a teacher on this node may have waiting before one elsewhere is asked instead."""

    hedge_after_s: float | None = Field(None, gt=0)
    """Ask a second teacher too when the first has not answered for so long, and take what comes first; null: never."""


class ReplicatedConfig(StrictModel):
    """Servers of one model."""

    addresses: tuple[Annotated[str, AfterValidator(_address)], ...] = ()
    """host:port of each replica of one model; dns:///name:port for all that a name resolves to, looked up again while
    the job runs; k8s:///service.namespace:port for all that are ready behind a service of the job's Kubernetes
    cluster. `kdmesh train --serve` fills it in."""

    routing: RoutingConfig = RoutingConfig()
    """Which of them gets a request."""

    @property
    def has_names(self) -> bool:
        """Whether servers may come and go."""
        return any(address.startswith(("dns:", "k8s:")) for address in self.addresses)
