"""What the student reads and what the teacher reads, where that is not the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kdmesh.errors import InvalidRequest
from kdmesh.types import Int32Array, TokenSequence

Int64Array = npt.NDArray[np.int64]


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
class Aligned(TokenSequence):
    """A sequence as the student's tokenizer has it, and the same text as the teacher's has it.

    Row a of the teacher's answers to row rows_A[a] of this one; other rows have no answer.

    Raises:
        InvalidRequest: rows and answers do not go together.
    """

    teacher: TokenSequence
    rows_A: Int32Array  # [A] strictly increasing, A >= 1

    def __post_init__(self) -> None:
        TokenSequence.__post_init__(self)
        rows = self.rows_A
        if (
            len(rows) != self.teacher.num_rows
            or (np.diff(rows) <= 0).any()
            or not 0 <= rows[0] <= rows[-1] < self.num_rows
        ):
            raise InvalidRequest(
                f"{self.teacher.num_rows} rows of the teacher do not answer to {len(rows)} of {self.num_rows}, in order"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """What a response follows."""

    token_ids: Int32Array  # [P], P >= 1
    teacher_ids: Int32Array | None = None  # what it follows for the teacher; None: the same
    teacher_name: str = ""  # of the one of several that is asked; empty: all are, or there is one


def teacher_side(sequences: Sequence[TokenSequence]) -> tuple[TokenSequence, ...]:
    """The sequences as the teacher reads them."""
    return tuple(s.teacher if isinstance(s, InContext | Aligned) else s for s in sequences)


def answered_rows(sequences: Sequence[TokenSequence]) -> Int64Array | None:
    """[A] which of all their rows the teacher answers, in order; None: all."""
    if not any(isinstance(sequence, Aligned) for sequence in sequences):
        return None
    first_rows = np.cumsum([0, *(sequence.num_rows for sequence in sequences)])
    rows = [
        first + (sequence.rows_A if isinstance(sequence, Aligned) else np.arange(sequence.num_rows))
        for sequence, first in zip(sequences, first_rows[:-1], strict=True)
    ]
    return np.concatenate(rows).astype(np.int64)


def first_rows(sequence: TokenSequence, count: int) -> TokenSequence | None:
    """The sequence cut after its first `count` loss tokens; None where the teacher would answer none of them."""
    positions = sequence.positions[:count].copy()  # copies, because a slice would keep the whole array alive
    token_ids = sequence.token_ids[: positions[-1] + 2].copy()
    if isinstance(sequence, Aligned):
        rows_A = sequence.rows_A[sequence.rows_A < count].copy()
        answers = first_rows(sequence.teacher, len(rows_A)) if len(rows_A) else None
        if answers is None:
            return None
        return replace(sequence, token_ids=token_ids, positions=positions, teacher=answers, rows_A=rows_A)
    if isinstance(sequence, InContext):
        teacher = first_rows(sequence.teacher, count)
        assert teacher is not None
        return replace(sequence, token_ids=token_ids, positions=positions, teacher=teacher)
    return replace(sequence, token_ids=token_ids, positions=positions)


def addressed(sequence: TokenSequence, teacher_name: str) -> TokenSequence:
    """The sequence, of which that teacher is asked."""
    if isinstance(sequence, InContext):
        return replace(sequence, teacher=addressed(sequence.teacher, teacher_name))
    return Addressed(token_ids=sequence.token_ids, positions=sequence.positions, teacher_name=teacher_name)
