"""Which doors a sender of weights offers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from kdmesh.rpc.weights import codec as weight_codec
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.weights.bucket_memory import BucketMemory
from kdmesh.weights.doors import Door, DoorChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorOffer:
    """What a sender has, and what it was told."""

    memory: BucketMemory
    choice: DoorChoice
    advertise: str  # address of this machine for groups; empty for that of the interface that leads to the server
    device: torch.device  # the sender's; NCCL is offered where it is a GPU
    bucket_s: float  # longest time for a server to take one bucket

    @property
    def doors(self) -> tuple[Door, ...]:
        """The best first, without inline."""
        groups = (Door.NCCL, Door.GLOO) if self.device.type == "cuda" and dist.is_nccl_available() else (Door.GLOO,)
        match self.choice:
            case "auto":
                return (Door.SHM, *groups)
            case "shm":
                return (Door.SHM,)
            case "collective":
                return groups
            case "inline":
                return ()

    @property
    def obstacle(self) -> str:
        """What is the matter with a server that takes none of them."""
        if self.choice == "shm":
            return "cannot reach this process's shared memory"
        return "cannot reach this process; source.rollouts.advertise says by which address it may"

    def announce(self, begin: pb.BeginUpdate) -> None:
        """Write it into the first message of an update."""
        begin.doors.extend(map(weight_codec.DOORS.to_wire, self.doors))
        if Door.SHM in self.doors:
            begin.broker_socket = str(self.memory.socket_path)
            begin.session, begin.node_nonce = self.memory.session, self.memory.nonce
