"""Chooses the door through which a client's rows come."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from kdmesh.errors import Unavailable
from kdmesh.handles.door import Door
from kdmesh.handles.rdma_agent import RemoteMemory
from kdmesh.handles.rdma_door import RdmaDoor, ServerCalls
from kdmesh.handles.shm_door import ShmDoor
from kdmesh.handles.stream_door import StreamDoor
from kdmesh.types import Handle
from kdmesh.v1 import teacher_pb2 as pb

log = logging.getLogger(__name__)

DoorName: TypeAlias = Literal["shm", "rdma", "stream"]
DoorChoice: TypeAlias = Literal["auto", "shm", "rdma", "stream"]

_BEST_FIRST: Sequence[DoorName] = ("shm", "rdma", "stream")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenDoor:
    """An open door, and why it is this one."""

    door: Door
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Doorway:
    """What doors to one server are made of.

    Attributes:
        opened: the server's answer to OpenSession.
        read: the chunks of a handle, in order.
        release: ends a handle.
        end: the same, and waits; raises HandleGone when it had ended before.
        locate: where a handle's segment lies for RDMA; without a handle, memory that begins with the node's nonce.
        lose: gives the session up: its door leads nowhere any more, and the next session finds another.
    """

    opened: pb.OpenSessionResponse
    read: Callable[[Handle], AsyncIterator[memoryview]]
    release: Callable[[Handle], None]
    end: Callable[[Handle], Awaitable[None]]
    locate: Callable[[Handle | None], Awaitable[RemoteMemory]]
    lose: Callable[[Unavailable], None]


async def open_door(choice: DoorChoice, way: Doorway, *, address: str) -> ChosenDoor:
    """The best door that can be opened, or the one that is asked for.

    Args:
        choice: `auto`, or the only door that will do.
        way: to the server.
        address: the server's, for the log.

    Raises:
        Unavailable: `choice` is a door that cannot be opened from here.
        HandleGone: the session has ended.
    """
    if choice != "auto":
        chosen = ChosenDoor(door=await _open(choice, way), reason="it was asked for")
    else:
        chosen = await _best(way)
    log.info("rows have a door", extra={"address": address, "door": chosen.door.name, "reason": chosen.reason})
    return chosen


async def _best(way: Doorway) -> ChosenDoor:
    obstacles: list[str] = []
    for name in _BEST_FIRST:
        try:
            door = await _open(name, way)
        except Unavailable as error:
            obstacles.append(f"{name}: {error}")
        else:
            return ChosenDoor(door=door, reason="; ".join(obstacles) or "it is the best")
    raise Unavailable("; ".join(obstacles))


async def _open(name: DoorName, way: Doorway) -> Door:
    match name:
        case "shm":
            opened = way.opened
            return await ShmDoor.connect(Path(opened.broker_socket), opened.session, opened.node_nonce)
        case "rdma":
            if not way.opened.has_rdma:
                raise Unavailable("the server has no RDMA")
            server = ServerCalls(locate=way.locate, end=way.end, abandon=way.release)
            return await RdmaDoor.connect(server, way.opened.node_nonce, on_lost=way.lose)
        case "stream":
            return StreamDoor(way.read, way.release)
