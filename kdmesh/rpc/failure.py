"""The failure of one request of a stream that goes on, as a message."""

from __future__ import annotations

from kdmesh.errors import RpcError, Unavailable
from kdmesh.rpc import status
from kdmesh.v1 import common_pb2


def to_wire(error: RpcError) -> common_pb2.Failure:
    """The error as a message."""
    wait_s = error.retry_after_s if isinstance(error, Unavailable) else 0.0
    return common_pb2.Failure(code=status.number(error), message=str(error), retry_after_ms=round(wait_s * 1000))


def from_wire(message: common_pb2.Failure) -> RpcError:
    """The error that a message stands for."""
    return status.from_number(message.code, message.message, retry_after_s=message.retry_after_ms / 1000)
