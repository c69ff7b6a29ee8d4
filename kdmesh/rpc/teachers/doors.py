"""Chooses the door through which a client's rows come."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from kdmesh.errors import ConfigError, Unavailable
from kdmesh.groups.pair_group import Backend
from kdmesh.handles.doors.collective import CollectiveDoor, Group
from kdmesh.handles.doors.door import Door
from kdmesh.handles.doors.fp8 import Fp8Door
from kdmesh.handles.doors.rdma import RdmaDoor, ServerCalls
from kdmesh.handles.doors.shm import ShmDoor
from kdmesh.handles.doors.stream import StreamDoor
from kdmesh.handles.rdma.agent import RemoteMemory
from kdmesh.rpc import group_codec
from kdmesh.types import Handle
from kdmesh.v1 import teacher_pb2 as pb

log = logging.getLogger(__name__)

DoorName: TypeAlias = Literal["shm", "rdma", "collective", "stream"]
DoorChoice: TypeAlias = Literal["auto", "shm", "rdma", "collective", "stream"]
Wire: TypeAlias = Literal["exact", "fp8"]
"""How a stream carries rows: as they are, or rounded (kdmesh.handles.fp8)."""

_BEST_FIRST: Sequence[DoorName] = ("shm", "rdma", "collective", "stream")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenDoor:
    """An open door, and why it is this one.

    Attributes:
        door: for rows.
        exact: for what must come as it is; mostly the same.
        reason: for people.
    """

    door: Door
    exact: Door
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Doorway:
    """What doors to one server are made of.

    Attributes:
        opened: the server's answer to OpenSession.
        read: the chunks of a handle, in order.
        read_fp8: the same as float8; None where rows must come as they are.
        release: ends a handle.
        end: the same, and waits; raises HandleGone when it had ended before.
        locate: where a handle's segment lies for RDMA; without a handle, memory that begins with the node's nonce.
        lose: gives the session up: its door leads nowhere any more, and the next session finds another.
        join: makes a group with the server, of one of these backends.
        has_gpu: whether this process may use one for NCCL.
    """

    opened: pb.OpenSessionResponse
    read: Callable[[Handle], AsyncIterator[memoryview]]
    read_fp8: Callable[[Handle], AsyncIterator[memoryview]] | None
    release: Callable[[Handle], None]
    end: Callable[[Handle], Awaitable[None]]
    locate: Callable[[Handle | None], Awaitable[RemoteMemory]]
    lose: Callable[[Unavailable], None]
    join: Callable[[tuple[Backend, ...]], Awaitable[Group]]
    has_gpu: bool


async def open_door(choice: DoorChoice, way: Doorway, *, address: str) -> ChosenDoor:
    """The best door that can be opened, or the one that is asked for.

    Args:
        choice: `auto`, or the only door that will do.
        way: to the server.
        address: the server's, for the log.

    Raises:
        Unavailable: `choice` is a door that cannot be opened from here.
        ConfigError: it is one that this process is not set up for.
        HandleGone: the session has ended.
    """
    if choice != "auto":
        chosen = _chosen(await _open(choice, way, is_asked_for=True), way, "it was asked for")
    else:
        chosen = await _best(way)
    log.info("rows have a door", extra={"address": address, "door": chosen.door.name, "reason": chosen.reason})
    return chosen


async def _best(way: Doorway) -> ChosenDoor:
    obstacles: list[str] = []
    for name in _BEST_FIRST:
        try:
            door = await _open(name, way, is_asked_for=False)
        except (Unavailable, ConfigError) as error:
            obstacles.append(f"{name}: {error}")
        else:
            return _chosen(door, way, "; ".join(obstacles) or "it is the best")
    raise Unavailable("; ".join(obstacles))


def _chosen(door: Door, way: Doorway, reason: str) -> ChosenDoor:
    exact = StreamDoor(way.read, way.release) if isinstance(door, Fp8Door) else door
    return ChosenDoor(door=door, exact=exact, reason=reason)


async def _open(name: DoorName, way: Doorway, *, is_asked_for: bool) -> Door:
    match name:
        case "shm":
            opened = way.opened
            return await ShmDoor.connect(
                Path(opened.broker_socket), opened.session, opened.node_nonce, on_lost=way.lose
            )
        case "rdma":
            if not way.opened.has_rdma:
                raise Unavailable("the server has no RDMA")
            server = ServerCalls(locate=way.locate, end=way.end, abandon=way.release)
            return await RdmaDoor.connect(server, way.opened.node_nonce, on_lost=way.lose)
        case "collective":
            door = CollectiveDoor(partial(way.join, _backends(way, is_asked_for=is_asked_for)), way.release)
            await door.open()
            return door
        case "stream":
            return StreamDoor(way.read, way.release) if way.read_fp8 is None else Fp8Door(way.read_fp8, way.release)


def _backends(way: Doorway, *, is_asked_for: bool) -> tuple[Backend, ...]:
    """What a group with the server can be made of. Raises Unavailable when it cannot, or had better not."""
    theirs = group_codec.backends_from_wire(way.opened.groups)
    if not theirs:
        raise Unavailable("the server makes no groups (its server.groups is false)")
    ours = (Backend.NCCL, Backend.GLOO) if way.has_gpu else (Backend.GLOO,)
    both = tuple(backend for backend in ours if backend in theirs)
    if not is_asked_for and Backend.NCCL not in both:
        raise Unavailable("without a GPU on both sides a group is no faster than a stream")
    return both
