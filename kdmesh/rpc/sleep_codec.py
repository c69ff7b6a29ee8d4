"""Sleep tags <-> wire."""

from __future__ import annotations

from collections.abc import Iterable, Set

from kdmesh.errors import InvalidRequest
from kdmesh.types import SleepTag
from kdmesh.v1 import common_pb2 as pb

_WIRE = {SleepTag.WEIGHTS: pb.SLEEP_TAG_WEIGHTS, SleepTag.KV_CACHE: pb.SLEEP_TAG_KV_CACHE}
_TAG: dict[int, SleepTag] = {wire: tag for tag, wire in _WIRE.items()}


def tags_to_wire(tags: Set[SleepTag]) -> list[pb.SleepTag.ValueType]:
    """In the order of their numbers."""
    return sorted(_WIRE[tag] for tag in tags)


def tags_from_wire(tags: Iterable[int]) -> frozenset[SleepTag]:
    """Raises InvalidRequest for a number that is no tag."""
    unknown = [tag for tag in tags if tag not in _TAG]
    if unknown:
        raise InvalidRequest(
            f"sleep tag {unknown[0]} is unknown; known: {', '.join(f'{t} ({n})' for n, t in _TAG.items())}"
        )
    return frozenset(_TAG[pb.SleepTag.ValueType(tag)] for tag in tags)
