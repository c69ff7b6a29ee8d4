"""What a server and SGLang's scheduler processes tell each other.

Over the server's private socket (SOCK_SEQPACKET, one JSON message each): a scheduler says Hello once; the server
shows it segments with Adopt, a descriptor beside it, which it answers with Adopted, and ends them with Drop.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

RECEIVE_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A scheduler has its model loaded."""

    rank: str  # for people
    writes: bool  # whether it is to write rows; its like compute the same ones
    unhooked: Sequence[str]  # functions of SGLang that our hooks are not on


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    """Map the segment whose descriptor comes with this."""

    number: int
    size_bytes: int
    holds_weights: bool  # new ones, for every scheduler to read; else rows, for some to write


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """It is mapped."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """It is used no more."""

    number: int


Message = Hello | Adopt | Adopted | Drop

_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in (Hello, Adopt, Adopted, Drop)}


def pack(message: Message) -> bytes:
    """The bytes of a message."""
    return json.dumps([type(message).__name__, asdict(message)]).encode()


def unpack(data: bytes) -> Message:
    """The message; both ends are of one version."""
    kind, fields = json.loads(data)
    return _KINDS[kind](**fields)
