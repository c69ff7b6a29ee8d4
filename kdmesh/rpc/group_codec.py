"""Translates what is said of private groups between protobuf messages and our types."""

from __future__ import annotations

from collections.abc import Iterable

from kdmesh.errors import InvalidRequest
from kdmesh.groups.meeting import SECRET_BYTES, Invitation
from kdmesh.groups.pair_group import Backend
from kdmesh.rpc.wire_enum import WireEnum
from kdmesh.v1 import teacher_pb2 as pb

_BACKENDS = WireEnum("group backend", {Backend.GLOO: pb.GROUP_BACKEND_GLOO, Backend.NCCL: pb.GROUP_BACKEND_NCCL})


def backends_from_wire(values: Iterable[int]) -> tuple[Backend, ...]:
    """Raises InvalidRequest on one that this version does not know."""
    return tuple(map(_BACKENDS.from_wire, values))


def backends_to_wire(backends: Iterable[Backend]) -> list[pb.GroupBackend.ValueType]:
    """The same on the wire."""
    return [_BACKENDS.to_wire(backend) for backend in backends]


def asked_into_group(m: pb.GroupInvitation) -> tuple[Backend, Invitation]:
    """Raises InvalidRequest when nobody could be invited by it."""
    return _BACKENDS.from_wire(m.backend), invitation(m.store_address, m.secret)


def ask_into_group(backend: Backend, asked: Invitation) -> pb.GroupInvitation:
    """The message that `asked_into_group` reads."""
    return pb.GroupInvitation(
        backend=_BACKENDS.to_wire(backend), store_address=asked.store_address, secret=asked.secret
    )


def invitation(store_address: str, secret: bytes) -> Invitation:
    """Raises InvalidRequest when nobody could be invited by it."""
    host, _, port = store_address.rpartition(":")
    if not (host and port.isdigit() and int(port) < 2**16):
        raise InvalidRequest(f"a store at {store_address!r}; it must be of the form host:port")
    if len(secret) != SECRET_BYTES:
        raise InvalidRequest(f"a secret of {len(secret)} bytes; it must have {SECRET_BYTES}")
    return Invitation(store_address=store_address, secret=secret)
