"""What the server and SGLang's scheduler processes tell each other.

Two ways. Over the server's private socket (SOCK_SEQPACKET, one JSON message each): a scheduler says Hello
once; the server shows it segments with Adopt, a descriptor beside it, which it answers with Adopted, and ends
them with Drop. Inside SGLang's own requests: `Ask`, in a request's custom_params.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from kdmesh.types import DType, Int32Array

SOCKET_VARIABLE = "KDMESH_SGLANG_SOCKET"
"""Names the socket, in the environment of SGLang's processes. Without it the plugin does nothing."""

RECEIVE_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A scheduler has its model loaded."""

    rank: str  # for people
    writes: bool  # whether it is to write rows; its like compute the same ones
    unhooked: Sequence[str]  # functions of SGLang that our hooks are not on


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    """Map the segment whose descriptor comes with this, for writing."""

    number: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """It is mapped."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """It is written no more."""

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ask:
    """Which rows of a sequence are wanted, and where."""

    segment: int  # number of the segment
    offset_bytes: int  # of the first row
    dtype: DType
    first_computed: int  # no hidden state from here on may come out of the prefix cache
    positions: Int32Array  # [R]

    def to_params(self) -> dict[str, int | str | list[int]]:
        """For custom_params, which hold numbers, strings and flat lists; positions as runs [begin, end)."""
        breaks = np.flatnonzero(np.diff(self.positions) != 1) + 1
        begins = self.positions[np.concatenate(([0], breaks))]
        ends = self.positions[np.concatenate((breaks - 1, [-1]))] + 1
        return {
            "kdmesh_segment": self.segment,
            "kdmesh_offset_bytes": self.offset_bytes,
            "kdmesh_dtype": self.dtype.value,
            "kdmesh_first_computed": self.first_computed,
            "kdmesh_runs": np.stack((begins, ends), axis=1).ravel().tolist(),
        }

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> Self | None:
        """None when the request is not one of ours."""
        if params is None or "kdmesh_segment" not in params:
            return None
        runs = params["kdmesh_runs"]
        return cls(
            segment=params["kdmesh_segment"],
            offset_bytes=params["kdmesh_offset_bytes"],
            dtype=DType(params["kdmesh_dtype"]),
            first_computed=params["kdmesh_first_computed"],
            positions=np.concatenate(
                [np.arange(a, b, dtype=np.int32) for a, b in zip(runs[::2], runs[1::2], strict=True)]
            ),
        )
