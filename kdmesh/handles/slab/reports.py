"""What a slab tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class SlotState(StrEnum):
    """What a slot is doing."""

    FREE = "free"
    FILLING = "filling"  # an engine may write it
    READY = "ready"  # published, waiting to be claimed
    HELD = "held"  # somebody reads it, or has said that they will
    ABANDONED = "abandoned"  # out of service: a holder without a session may still read it, or it is worn


@dataclass(slots=True, kw_only=True)
class Counters:
    """Events since the start; each only grows."""

    acquired: int = 0
    claimed: int = 0  # through shared memory
    claimed_bytes: int = 0
    streamed: int = 0  # reads through a stream
    released: int = 0
    unclaimed: int = 0  # answers that nobody claimed in time
    abandoned: int = 0  # times a slot went out of service
    renewed: int = 0  # times such a slot got new memory
    sessions_opened: int = 0
    sessions_expired: int = 0  # by silence
    sessions_died: int = 0  # with their process


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """One open session, as an operator sees it."""

    job: str
    slots: int  # how many it has: being filled, ready or held
    silent_s: float  # since it was last heard of


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEnd:
    """A session that has just ended."""

    token: bytes
    job: str
    abandoned: int  # slots that went out of service with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The slab at one moment, for people and for metrics."""

    slots: Mapping[SlotState, int]  # how many in each state; together all
    slot_bytes: int
    sessions: tuple[SessionState, ...]
    orphans: int  # replaced memories, each slot_bytes, that a silent client may still map
    shared_bytes: int  # in shared segments (output heads)
    connections: int  # of the broker
    counters: Counters
