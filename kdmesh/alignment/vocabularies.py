"""Which tokens two vocabularies share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdmesh.types import Int32Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedTokens:
    """Tokens of both that stand for the same bytes: student_ids[n] and teacher_ids[n] are one."""

    student_ids: Int32Array  # [S] ascending
    teacher_ids: Int32Array  # [S]


def shared_tokens(
    student: Sequence[bytes | None], teacher: Sequence[bytes | None], *, also: Sequence[tuple[int, int]]
) -> SharedTokens:
    """The pairs by bytes; of several tokens for the same bytes the first, and none for no bytes.

    Args:
        student: by token id, see `token_bytes`.
        teacher: likewise.
        also: pairs besides (student id, teacher id), such as the tokens that end a turn.
    """
    teacher_by_bytes = _by_bytes(teacher)
    pairs = {
        number: teacher_by_bytes[piece] for piece, number in _by_bytes(student).items() if piece in teacher_by_bytes
    }
    pairs.update(also)
    ids = np.asarray(sorted(pairs.items()), dtype=np.int32).reshape(-1, 2)
    return SharedTokens(student_ids=ids[:, 0], teacher_ids=ids[:, 1])


def _by_bytes(table: Sequence[bytes | None]) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for number, piece in enumerate(table):
        if piece:
            found.setdefault(piece, number)
    return found
