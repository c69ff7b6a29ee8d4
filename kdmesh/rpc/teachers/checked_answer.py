"""Holds a teacher's answer against what it was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from kdmesh.errors import EngineFailure, InvalidRequest
from kdmesh.rpc import codec
from kdmesh.tokens import digest
from kdmesh.types import Handle, ModelDescription, TokenSequence
from kdmesh.v1 import teacher_pb2 as pb


def checked_handle(
    result: pb.PrefillResult,
    sequences: Sequence[TokenSequence],
    model: ModelDescription,
    address: str,
    *,
    layers: Sequence[int],
) -> Handle:
    """The handle, when it is the answer to these sequences and layers. Raises EngineFailure when it is not."""
    if result.digest != digest(sequences, layers):
        raise EngineFailure(f"{address} answered other sequences than it was asked for")
    try:
        handle = codec.handle_from_wire(result.rows)
    except InvalidRequest as error:
        raise EngineFailure(f"{address} answered with no valid handle: {error}") from None
    rows = sum(sequence.num_rows for sequence in sequences)
    wanted = (rows, model.num_columns(layers), model.dtype)
    if (handle.rows, handle.cols, handle.dtype) != wanted:
        raise EngineFailure(
            f"{address} answered {handle.rows} x {handle.cols} {handle.dtype}; asked for were {rows} rows of "
            f"{model.num_columns(layers)} {model.dtype}"
        )
    return handle
