"""The rpcs Sleep and Wake, which every server has."""

from __future__ import annotations

from kdmesh.rpc.sleep_codec import tags_from_wire, tags_to_wire
from kdmesh.serving.engine.sleep import DRAIN_S, Sleep
from kdmesh.v1 import common_pb2 as pb


async def answer_sleep(sleep: Sleep, request: pb.SleepRequest) -> pb.SleepResponse:
    """Raises RpcError as the proto says."""
    drain_s = request.drain_ms / 1000 or DRAIN_S
    return pb.SleepResponse(asleep=tags_to_wire(await sleep.sleep(tags_from_wire(request.tags), drain_s=drain_s)))


async def answer_wake(sleep: Sleep, request: pb.WakeRequest) -> pb.WakeResponse:
    """Raises RpcError as the proto says."""
    return pb.WakeResponse(asleep=tags_to_wire(await sleep.wake(tags_from_wire(request.tags))))
