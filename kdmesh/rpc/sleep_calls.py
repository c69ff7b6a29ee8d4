"""The client's side of Sleep and Wake, which every server has."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, TypeAlias

from kdmesh.rpc.calls import our_errors
from kdmesh.rpc.sleep_codec import tags_to_wire
from kdmesh.types import SleepTag
from kdmesh.v1 import common_pb2 as pb

if TYPE_CHECKING:
    from kdmesh.v1.rollout_pb2_grpc import RolloutAsyncStub
    from kdmesh.v1.teacher_pb2_grpc import TeacherAsyncStub

    Stub: TypeAlias = RolloutAsyncStub | TeacherAsyncStub

# Beside the drain: as much as a device holds is copied.
_COPY_S = 600.0


async def sleep(stub: Stub, address: str, tags: Set[SleepTag], *, drain_s: float) -> None:
    """Have the server give these back, after what it computes now. Raises RpcError as the proto says of Sleep."""
    request = pb.SleepRequest(tags=tags_to_wire(tags), drain_ms=max(1, round(drain_s * 1000)))
    with our_errors(address):
        await stub.Sleep(request, timeout=drain_s + _COPY_S)


async def wake(stub: Stub, address: str, tags: Set[SleepTag]) -> None:
    """Have the server take these again. Raises RpcError as the proto says of Wake."""
    with our_errors(address):
        await stub.Wake(pb.WakeRequest(tags=tags_to_wire(tags)), timeout=_COPY_S)
