"""A machine's place in a training job, as its environment says: the variables of torchrun's agent, and one of ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from kdmesh.errors import ConfigError

_ANY_COUNT = ("", "auto", "gpu", "cpu")  # what torchrun takes for as many ranks as there are devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One of several machines, each with as many ranks."""

    node: int
    nodes: int
    ranks_per_node: int | None  # None: the configuration decides, or the devices
    first_node: str  # address of the machine with rank 0
    port: int  # where its rank 0 meets the others

    def __post_init__(self) -> None:
        """Refuse what no job can be made of."""
        if not 0 <= self.node < self.nodes:
            raise ConfigError(f"PET_NODE_RANK is {self.node}; with PET_NNODES {self.nodes} it must be from 0 to less")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise ConfigError(f"PET_NPROC_PER_NODE is {self.ranks_per_node}; there must be 1 at least")


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """None on a machine that is a job's only one. Raises ConfigError when the variables make no sense."""
    nodes = _number(environment, "PET_NNODES", default=1)
    if nodes == 1:
        return None
    if not environment.get("PET_MASTER_ADDR"):
        raise ConfigError(f"PET_NNODES is {nodes}, and PET_MASTER_ADDR does not say where the first of them is")
    return Place(
        node=_number(environment, "PET_NODE_RANK", default=0),
        nodes=nodes,
        ranks_per_node=ranks_per_node(environment),
        first_node=environment["PET_MASTER_ADDR"],
        port=_number(environment, "PET_MASTER_PORT", default=29500),
    )


def ranks_per_node(environment: Mapping[str, str] = os.environ) -> int | None:
    """As many as the environment wants here; None where it does not say. Raises ConfigError."""
    if environment.get("PET_NPROC_PER_NODE", "") in _ANY_COUNT:
        return None
    return _number(environment, "PET_NPROC_PER_NODE", default=1)


def exit_when_stopped(environment: Mapping[str, str] = os.environ) -> int | None:
    """Exit code of a run that was stopped before its last step, for whoever starts it again; None: that is no failure.

    Whoever sets it also sees to it that a run which does not stop is killed.
    """
    if "KDMESH_EXIT_WHEN_STOPPED" not in environment:
        return None
    return _number(environment, "KDMESH_EXIT_WHEN_STOPPED", default=0) or None


def _number(environment: Mapping[str, str], name: str, *, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}; it must be a number")
    return int(text)
