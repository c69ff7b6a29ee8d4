"""The kinds of servers whose weights can be replaced, as whoever sends weights sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import grpc

from kdmesh.rpc import codec
from kdmesh.rpc.calls import UNARY_TIMEOUT_S
from kdmesh.rpc.ordered_stream import OrderedStream
from kdmesh.types import DType
from kdmesh.v1 import rollout_pb2, teacher_pb2
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from kdmesh.v1.teacher_pb2_grpc import TeacherStub

UpdateCall: TypeAlias = "grpc.aio.StreamStreamCall[pb.UpdateWeightsRequest, pb.UpdateWeightsReply]"
UpdateStream: TypeAlias = OrderedStream[pb.UpdateWeightsRequest, pb.UpdateWeightsReply]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedWeights:
    """What a server says of its weights."""

    address: str
    version: int
    dtype: DType


class WeightService(Protocol):
    """One kind of server."""

    def update(self, channel: grpc.aio.Channel) -> UpdateCall:
        """An UpdateWeights call, just started."""
        ...

    async def describe(self, channel: grpc.aio.Channel, address: str) -> ServedWeights:
        """What is served now. Raises AioRpcError, or InvalidRequest when that cannot be."""
        ...


class _Rollouts:
    def update(self, channel: grpc.aio.Channel) -> UpdateCall:
        """See WeightService."""
        return RolloutStub(channel).UpdateWeights()

    async def describe(self, channel: grpc.aio.Channel, address: str) -> ServedWeights:
        """See WeightService."""
        described = await RolloutStub(channel).Describe(rollout_pb2.DescribeRolloutRequest(), timeout=UNARY_TIMEOUT_S)
        return _served(address, described)


class _Teachers:
    def update(self, channel: grpc.aio.Channel) -> UpdateCall:
        """See WeightService."""
        return TeacherStub(channel).UpdateWeights()

    async def describe(self, channel: grpc.aio.Channel, address: str) -> ServedWeights:
        """See WeightService."""
        described = await TeacherStub(channel).Describe(teacher_pb2.DescribeRequest(), timeout=UNARY_TIMEOUT_S)
        return _served(address, described)


def _served(
    address: str, described: rollout_pb2.DescribeRolloutResponse | teacher_pb2.DescribeResponse
) -> ServedWeights:
    dtype = codec.DTYPES.from_wire(described.dtype)
    return ServedWeights(address=address, version=described.weight_version, dtype=dtype)


ROLLOUTS: WeightService = _Rollouts()
"""Rollout servers."""

TEACHERS: WeightService = _Teachers()
"""Teacher servers whose weights are not frozen."""
