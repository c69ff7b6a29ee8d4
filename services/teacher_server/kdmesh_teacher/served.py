"""Which weights a teacher serves, and the head that belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdmesh.errors import ConfigError, Unavailable
from kdmesh.handles.slab.shared import Matrix, Shape
from kdmesh.handles.slab.store import SlabStore
from kdmesh.types import Handle
from kdmesh_teacher.engine import EngineDescription, HeadParts

FIRST_VERSION = 1
"""Of the weights that an engine loads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedWeights:
    """One version. Replaced as a whole, so that nobody ever gets the head of another."""

    version: int
    head: tuple[Handle, ...]  # weight, then bias if there is one


async def first_weights(store: SlabStore, parts: HeadParts, model: EngineDescription) -> ServedWeights:
    """Those the engine has loaded. Raises ConfigError when there is no memory for the head."""
    rows = model.head.padded_vocabulary_size
    matrices = [Matrix(data=parts.weight, rows=rows, cols=model.hidden_size, dtype=parts.dtype)]
    if parts.bias is not None:
        matrices.append(Matrix(data=parts.bias, rows=1, cols=rows, dtype=parts.dtype))
    return ServedWeights(version=FIRST_VERSION, head=await store.add_shared_segment(matrices))


async def room_for_another_head(store: SlabStore, served: ServedWeights) -> tuple[Handle, ...]:
    """Memory for the head of newer weights. Raises Unavailable when there is not enough."""
    shapes = [Shape(rows=handle.rows, cols=handle.cols, dtype=handle.dtype) for handle in served.head]
    try:
        return await store.reserve_shared_segment(shapes)
    except ConfigError as error:
        raise Unavailable(f"no memory for the new weights' head: {error}") from None


def matrices_of(parts: HeadParts) -> Sequence[memoryview]:
    """In the order of a head's handles."""
    return [matrix for matrix in (parts.weight, parts.bias) if matrix is not None]
