"""The ways by which the bytes of weights can travel."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, TypeAlias


class Door(StrEnum):
    """One way."""

    SHM = "shm"  # the sender's memory, on its node
    NCCL = "nccl"  # a private group of two processes, from one GPU's memory to the other's
    GLOO = "gloo"  # a private group of two processes, from memory to memory
    INLINE = "inline"  # inside the messages


DoorChoice: TypeAlias = Literal["auto", "shm", "collective", "inline"]
"""What a sender is told: one of them, or auto for the first that works."""

GROUPS = (Door.NCCL, Door.GLOO)
"""What collective stands for."""
