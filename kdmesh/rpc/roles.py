"""The one table of what role each rpc needs."""

from __future__ import annotations

from kdmesh.auth.identity import Role

_ROLES: dict[str, dict[str, Role | None]] = {
    # None: whoever looks after processes need not be known to them.
    "grpc.health.v1.Health": {"Check": None, "Watch": None},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": Role.VIEWER},
    "kdmesh.v1.Teacher": {
        "Describe": Role.VIEWER,
        "OpenSession": Role.JOB,
        "KeepAlive": Role.JOB,
        "CloseSession": Role.JOB,
        "Prefill": Role.JOB,
        "PutImages": Role.JOB,
        "FindCached": Role.JOB,
        "Release": Role.JOB,
        "GetHead": Role.JOB,
        "ReadHandle": Role.JOB,
        "LocateMemory": Role.JOB,
        "CarryRows": Role.JOB,
        "Sleep": Role.OPERATOR,
        "Wake": Role.OPERATOR,
        "UpdateWeights": Role.OPERATOR,
    },
    "kdmesh.v1.Rollout": {
        "Describe": Role.VIEWER,
        "Generate": Role.JOB,
        "PutImages": Role.JOB,
        "Sleep": Role.OPERATOR,
        "Wake": Role.OPERATOR,
        "UpdateWeights": Role.OPERATOR,
    },
}


def needed(method: str) -> Role | None:
    """The role that `/service/Method` needs; None: nobody is asked. What the table lacks needs an operator."""
    service, _, name = method.removeprefix("/").rpartition("/")
    return _ROLES.get(service, {}).get(name, Role.OPERATOR)
