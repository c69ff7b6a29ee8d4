"""Who somebody is, and what that lets them do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import StringConstraints

from kdmesh.errors import PermissionDenied

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$"
Name = Annotated[str, StringConstraints(pattern=_NAME)]
"""Of a job or a person; it is shown in logs and metrics."""


def is_name(text: str) -> bool:
    """Whether it can be a name."""
    return re.fullmatch(_NAME, text) is not None


class Role(StrEnum):
    """What an identity may do; each may do all that the ones before it may."""

    VIEWER = "viewer"  # read metrics and states
    JOB = "job"  # open sessions, ask for rows and samples
    OPERATOR = "operator"  # what changes a server for others: weights, sleep, quotas

    def includes(self, other: Role) -> bool:
        """Whether who has this role may do what `other` is needed for."""
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True)
class Identity:
    """A name and its role. All who have the same name are the same job."""

    name: str  # empty: nobody asked who it is
    role: Role

    def require(self, role: Role, what: str) -> None:
        """Raises PermissionDenied unless `what`, which needs `role`, is allowed."""
        if not self.role.includes(role):
            raise PermissionDenied(f"{what} needs role {role}; {self.name} has role {self.role}")


ANYBODY = Identity("", Role.OPERATOR)
"""The caller of a server that asks nobody who they are."""
