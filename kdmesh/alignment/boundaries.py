"""Which tokens can only come where a word has ended, under two tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kdmesh.types import Int32Array

_WHITESPACE = b" \t\n\r"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoundaryTokens:
    """Of each vocabulary, the tokens that begin with a boundary byte or end a turn; ascending, at least one."""

    student_ids: Int32Array  # [B]
    teacher_ids: Int32Array  # [B']


def boundary_bytes(*tables: Iterable[bytes | None]) -> bytes:
    """The whitespace that no token of any vocabulary has behind other bytes, so that it always begins a token.

    Args:
        tables: see `token_bytes`.
    """
    inside = {byte for table in tables for piece in table if piece for byte in piece.lstrip(_WHITESPACE)}
    return bytes(byte for byte in _WHITESPACE if byte not in inside)


def boundary_tokens(
    student: Sequence[bytes | None], teacher: Sequence[bytes | None], *, ends: Sequence[tuple[int, int]]
) -> BoundaryTokens | None:
    """Those of two vocabularies; None where they have no boundary byte in common.

    Args:
        student: by token id, see `token_bytes`.
        teacher: likewise.
        ends: (student id, teacher id) of what ends a turn.
    """
    bounds = boundary_bytes(student, teacher)
    if not bounds:
        return None
    own, theirs = (
        sorted({*also, *(number for number, piece in enumerate(table) if piece and piece[0] in bounds)})
        for table, also in ((student, [one for one, _ in ends]), (teacher, [other for _, other in ends]))
    )
    if not own or not theirs:
        return None
    return BoundaryTokens(student_ids=np.asarray(own, np.int32), teacher_ids=np.asarray(theirs, np.int32))
