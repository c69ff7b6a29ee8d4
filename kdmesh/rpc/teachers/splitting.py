"""Cuts a group of sequences into requests that a server's limits allow."""

from __future__ import annotations

from collections.abc import Sequence

from kdmesh.errors import InvalidRequest
from kdmesh.types import ModelDescription, TokenSequence


def split(sequences: Sequence[TokenSequence], model: ModelDescription) -> list[tuple[TokenSequence, ...]]:
    """The sequences in order, in as few requests as this order allows; at least one.

    Raises:
        InvalidRequest: there is no sequence, or one exceeds a limit by itself.
    """
    if not sequences:
        raise InvalidRequest("no sequence to ask rows for")
    longest = min(model.max_sequence_tokens, model.max_request_tokens)
    parts: list[list[TokenSequence]] = []
    tokens, rows = 0, 0
    for index, sequence in enumerate(sequences):
        if sequence.num_tokens > longest:
            raise InvalidRequest(
                f"sequence {index} has {sequence.num_tokens} tokens; the teacher takes at most {longest}"
            )
        if sequence.num_rows > model.max_request_rows:
            raise InvalidRequest(
                f"sequence {index} asks for {sequence.num_rows} rows; one slot of the teacher holds "
                f"{model.max_request_rows}: raise its slab.slot_mib"
            )
        tokens, rows = tokens + sequence.num_tokens, rows + sequence.num_rows
        if not parts or tokens > model.max_request_tokens or rows > model.max_request_rows:
            parts.append([])
            tokens, rows = sequence.num_tokens, sequence.num_rows
        parts[-1].append(sequence)
    return [tuple(part) for part in parts]
