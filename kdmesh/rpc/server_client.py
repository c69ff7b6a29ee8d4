"""A connection to one server, of whatever kind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Set
from typing import TYPE_CHECKING

from kdmesh.auth.config import AccessConfig
from kdmesh.errors import RpcError, Unavailable
from kdmesh.rpc.calls import our_errors
from kdmesh.rpc.channel import open_channel
from kdmesh.rpc.sleep_codec import tags_to_wire
from kdmesh.types import SleepTag
from kdmesh.v1 import common_pb2 as pb

if TYPE_CHECKING:
    from kdmesh.v1.rollout_pb2_grpc import RolloutAsyncStub
    from kdmesh.v1.teacher_pb2_grpc import TeacherAsyncStub

# Beside the drain: as much as a device holds is copied.
_COPY_S = 600.0


class ServerClient:
    """Lost for good when it is lost. Belongs to the event loop that made it.

    Attributes:
        address: host:port.
    """

    _stub: RolloutAsyncStub | TeacherAsyncStub

    def __init__(self, address: str, access: AccessConfig) -> None:
        """Raises ConfigError when `access` cannot be used."""
        self.address = address
        self._channel = open_channel(address, access)
        self._lost: asyncio.Future[RpcError] = asyncio.get_running_loop().create_future()
        self._closing = contextlib.AsyncExitStack()
        self._closing.push_async_callback(self._channel.close)
        self._closing_turn = asyncio.Lock()

    async def sleep(self, tags: Set[SleepTag], *, drain_s: float) -> None:
        """Have the server give these back, after what it computes now. Raises RpcError as the proto says of Sleep."""
        request = pb.SleepRequest(tags=tags_to_wire(tags), drain_ms=max(1, round(drain_s * 1000)))
        with our_errors(self.address):
            await self._stub.Sleep(request, timeout=drain_s + _COPY_S)

    async def wake(self, tags: Set[SleepTag]) -> None:
        """Have the server take these again. Raises RpcError as the proto says of Wake."""
        with our_errors(self.address):
            await self._stub.Wake(pb.WakeRequest(tags=tags_to_wire(tags)), timeout=_COPY_S)

    async def wait_lost(self) -> RpcError:
        """Return when this client cannot be used any more, with the reason."""
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        """End the connection; requests under way fail as Unavailable. Tensors stay good."""
        self._lose(Unavailable(f"the connection to {self.address} was closed", retry_after_s=0.0))
        # Who waits for the loss closes it too, and must not take the channel from the farewell that needs it.
        async with self._closing_turn:
            await self._closing.aclose()

    def _lose(self, reason: RpcError) -> None:
        if not self._lost.done():
            self._lost.set_result(reason)
