"""Chooses the door through which a client's rows come."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Literal, TypeAlias, assert_never

from kdmesh.errors import Unavailable
from kdmesh.handles.door import Door
from kdmesh.handles.shm_door import ShmDoor
from kdmesh.handles.stream_door import StreamDoor
from kdmesh.types import Handle
from kdmesh.v1 import teacher_pb2 as pb

log = logging.getLogger(__name__)

DoorChoice: TypeAlias = Literal["auto", "shm", "stream"]


async def open_door(
    choice: DoorChoice,
    opened: pb.OpenSessionResponse,
    *,
    read: Callable[[Handle], AsyncIterator[memoryview]],
    release: Callable[[Handle], None],
) -> Door:
    """Shared memory where the server proves to be on this node, else the stream; or the one that is asked for.

    Args:
        choice: `auto`, or the only door that will do.
        opened: the server's answer to OpenSession.
        read: for the stream door.
        release: for the stream door.

    Raises:
        Unavailable: `choice` is shm, and the server's shared memory cannot be reached from here.
        HandleGone: the session has ended.
    """
    match choice:
        case "stream":
            return StreamDoor(read, release)
        case "shm":
            return await _shared_memory(opened)
        case "auto":
            try:
                return await _shared_memory(opened)
            except Unavailable as error:
                log.info("rows come by stream", extra={"reason": str(error)})
                return StreamDoor(read, release)
        case _:
            assert_never(choice)


async def _shared_memory(opened: pb.OpenSessionResponse) -> ShmDoor:
    return await ShmDoor.connect(Path(opened.broker_socket), opened.session, opened.node_nonce)
