"""Sleep tags <-> wire."""

from __future__ import annotations

from collections.abc import Iterable, Set

from kdmesh.rpc.wire_enum import WireEnum
from kdmesh.types import SleepTag
from kdmesh.v1 import common_pb2 as pb

_TAGS = WireEnum("sleep tag", {SleepTag.WEIGHTS: pb.SLEEP_TAG_WEIGHTS, SleepTag.KV_CACHE: pb.SLEEP_TAG_KV_CACHE})


def tags_to_wire(tags: Set[SleepTag]) -> list[pb.SleepTag.ValueType]:
    """In the order of their numbers."""
    return sorted(map(_TAGS.to_wire, tags))


def tags_from_wire(tags: Iterable[int]) -> frozenset[SleepTag]:
    """Raises InvalidRequest for a number that is no tag."""
    return frozenset(map(_TAGS.from_wire, tags))
