"""What a job's sessions with its teachers have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.rpc.teachers.doors import DoorChoice, Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """How to get into a teacher server, and how its rows come."""

    job: str  # for the logs and metrics of a server that asks nobody who they are
    door: DoorChoice = "auto"  # auto takes shared memory where the teacher is on this node
    access: AccessConfig = OPEN_ACCESS
    wire: Wire = "exact"  # how a stream carries rows; fp8 halves the bytes and rounds
    gpu: torch.device | None = None  # of this process, which rows may pass through; None where it has none
