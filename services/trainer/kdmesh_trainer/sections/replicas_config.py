"""What the trainer can be told about several servers of one model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from kdmesh.auth.config import AccessConfig
from kdmesh.config import StrictModel

LONGEST_WAIT_S = 2_592_000
"""Most seconds that a deadline may have: 30 days."""

_SERVER = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^:/\s\[\]]+):([0-9]{1,5})")
_MOST_PORT = 65535
_NAME = re.compile(r"dns:///[^:/\s]+:[0-9]+")
_SERVICE = re.compile(r"k8s:///[a-z0-9-]+(\.[a-z0-9-]+)?:[a-z0-9-]+")


def checked_address(value: str) -> str:
    """The same, host:port of one server or a name of several. Raises ValueError when it has another form."""
    if value.startswith("dns:") and not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not of the form dns:///name:port")
    if value.startswith("k8s:") and not _SERVICE.fullmatch(value):
        raise ValueError(f"{value!r} is not of the form k8s:///service:port or k8s:///service.namespace:port")
    if not value.startswith(("dns:", "k8s:")):
        server = _SERVER.fullmatch(value)
        if server is None or not 0 < int(server[1]) <= _MOST_PORT:
            raise ValueError(f"{value!r} is not of the form host:port")
    return value


Address = Annotated[str, AfterValidator(checked_address)]
"""host:port of one server, or a name of several."""


def are_named(addresses: Sequence[str]) -> bool:
    """Whether servers may come and go."""
    return any(address.startswith(("dns:", "k8s:")) for address in addresses)


def check_can_be_known(access: AccessConfig, addresses: Sequence[str]) -> None:
    """Raises ValueError for servers found by name that TLS could not know."""
    if are_named(addresses) and access.tls is not None and access.tls.server_name is None:
        raise ValueError(
            "access.tls needs server_name with dns:/// and k8s:/// addresses: servers are reached by the numbers "
            "that a name stands for, which their certificates do not have"
        )


class RoutingConfig(StrictModel):
    """Which of several teachers gets a request."""

    local_tokens: int = Field(8192, ge=0)
    """Tokens more that a teacher on this node may have waiting before one elsewhere is asked instead."""

    hedge_after_s: float | None = Field(None, gt=0)
    """Ask a second teacher too when the first has not answered for so long, and take what comes first; null: never."""


class ReplicatedConfig(StrictModel):
    """Servers of one model."""

    addresses: tuple[Address, ...] = ()
    """host:port of each replica of one model; dns:///name:port for all that a name resolves to, looked up again while
    the job runs; k8s:///service.namespace:port for all that are ready behind a service of the job's Kubernetes
    cluster. `kdmesh train --serve` fills it in."""

    routing: RoutingConfig = RoutingConfig()
    """Which of them gets a request."""

    @property
    def has_names(self) -> bool:
        """Whether servers may come and go."""
        return are_named(self.addresses)
