"""What the student reads and what the teacher reads, where that is not the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kdmesh.errors import InvalidRequest
from kdmesh.types import Int32Array, TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Addressed(TokenSequence):
    """A sequence as one of several teachers reads it."""

    teacher_name: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InContext(TokenSequence):
    """A sequence as the student reads it, and the same response after the prompt that the teacher reads.

    Row r of the one answers to row r of the other; where they are in their sequence differs.

    Raises:
        InvalidRequest: the two do not have the same loss tokens.
    """

    teacher: TokenSequence

    def __post_init__(self) -> None:
        TokenSequence.__post_init__(self)
        if not np.array_equal(self.labels, self.teacher.labels):
            raise InvalidRequest(
                f"the student's sequence has {self.num_rows} loss tokens and the teacher's {self.teacher.num_rows}; "
                "they must be the same tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """What a response follows."""

    token_ids: Int32Array  # [P], P >= 1
    teacher_ids: Int32Array | None = None  # what it follows for the teacher; None: the same
    teacher_name: str = ""  # of the one of several that is asked; empty: all are, or there is one


def teacher_side(sequences: Sequence[TokenSequence]) -> tuple[TokenSequence, ...]:
    """The sequences as the teacher reads them."""
    return tuple(s.teacher if isinstance(s, InContext) else s for s in sequences)


def first_rows(sequence: TokenSequence, count: int) -> TokenSequence:
    """The sequence cut after its first `count` loss tokens."""
    positions = sequence.positions[:count].copy()  # copies, because a slice would keep the whole array alive
    token_ids = sequence.token_ids[: positions[-1] + 2].copy()
    if isinstance(sequence, InContext):
        teacher = first_rows(sequence.teacher, count)
        return replace(sequence, token_ids=token_ids, positions=positions, teacher=teacher)
    return replace(sequence, token_ids=token_ids, positions=positions)


def addressed(sequence: TokenSequence, teacher_name: str) -> TokenSequence:
    """The sequence, of which that teacher is asked."""
    if isinstance(sequence, InContext):
        return replace(sequence, teacher=addressed(sequence.teacher, teacher_name))
    return Addressed(token_ids=sequence.token_ids, positions=sequence.positions, teacher_name=teacher_name)
