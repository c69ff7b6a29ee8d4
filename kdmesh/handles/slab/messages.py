"""The messages between the broker and a shared-memory door.

They go over a Unix socket of type SOCK_SEQPACKET, which keeps message borders and order. Every
message is one fixed-size struct, little-endian:

  request, 28 bytes:  op u8, 3 zero bytes, segment u32, epoch u32, secret 16 bytes
    HELLO    once, first; segment is the protocol version, epoch 0, secret the session's token
    CLAIM    a handle: its segment, epoch and token
    RELEASE  the same; has no reply
  reply, 32 bytes:    status u8, 7 zero bytes, size u64, nonce 16 bytes
    OK       to HELLO: nonce is the server's, size 0
             to CLAIM: size is the segment's; its descriptor comes along (SCM_RIGHTS) unless this
             connection has been sent this segment in this epoch before
    GONE     to HELLO: unknown session; to CLAIM: the handle has ended

Replies come in the order of the requests. A client has at most MAX_UNANSWERED requests
unanswered. Its end of the socket stays open as long as anything it claimed may be read: when the
broker sees the socket close, it gives the slots to others. A client that breaks these rules is hung up on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

VERSION = 1
MAX_UNANSWERED = 64
RECEIVE_BYTES = 64  # longer than any message, so that one that is too long shows

_REQUEST = struct.Struct("<B3xII16s")
_REPLY = struct.Struct("<B7xQ16s")


class Op(IntEnum):
    """What a request asks for."""

    HELLO = 1
    CLAIM = 2
    RELEASE = 3


class Status(IntEnum):
    """How a reply begins."""

    OK = 0
    GONE = 1


_OPS = frozenset(Op)
_STATUSES = frozenset(Status)


@dataclass(frozen=True, slots=True)
class Request:
    """Client to broker. CLAIM and RELEASE have the fields of a handle's key."""

    op: Op
    segment: int
    epoch: int
    token: bytes

    def pack(self) -> bytes:
        """As it is sent."""
        return _REQUEST.pack(self.op, self.segment, self.epoch, self.token)

    @classmethod
    def unpack(cls, message: bytes) -> Self | None:
        """None when the message is not a request."""
        if len(message) != _REQUEST.size or message[0] not in _OPS:
            return None
        op, segment, epoch, token = _REQUEST.unpack(message)
        return cls(Op(op), segment, epoch, token)


@dataclass(frozen=True, slots=True)
class Reply:
    """Broker to client."""

    status: Status
    size_bytes: int = 0
    nonce: bytes = bytes(16)

    def pack(self) -> bytes:
        """As it is sent."""
        return _REPLY.pack(self.status, self.size_bytes, self.nonce)

    @classmethod
    def unpack(cls, message: bytes) -> Self | None:
        """None when the message is not a reply."""
        if len(message) != _REPLY.size or message[0] not in _STATUSES:
            return None
        status, size_bytes, nonce = _REPLY.unpack(message)
        return cls(Status(status), size_bytes, nonce)
