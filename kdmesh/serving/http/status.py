"""A server on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdmesh.serving.jobs.state import JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabStatus:
    """The shared memory that answers lie in."""

    slots: Mapping[str, int]  # by state
    slot_bytes: int
    orphans: int  # replaced memories that a silent client may still map


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """What a server does that has loaded its model."""

    model: str
    weight_version: int
    waiting_requests: int  # or samples
    waiting_tokens: int
    tokens_per_s: float  # of all jobs, lately
    engine_tokens_per_s: float | None  # while it computes; None before its first batch
    slab: SlabStatus | None  # None: the server has none
    jobs: Sequence[JobState]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A server at one moment."""

    service: str
    state: str  # "ready", or why no work is taken
    working: Working | None  # None while the model loads
