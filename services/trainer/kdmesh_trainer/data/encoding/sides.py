"""What the student reads and what the teacher reads, where that is not the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kdmesh.chats.chat_rows import Chat
from kdmesh.errors import InvalidRequest
from kdmesh.types import Int32Array, PlacedImage, TokenSequence
from kdmesh_trainer.data.lazy import Lazy

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
class Chunks:
    """Runs of rows of two sequences whose labels stand for the same bytes, in order; none is empty, none overlap."""

    student_begins: Int32Array  # [C]
    student_ends: Int32Array  # [C]
    teacher_begins: Int32Array  # [C]
    teacher_ends: Int32Array  # [C]

    @property
    def num_student_rows(self) -> int:
        """Rows of the student's in chunks."""
        return int((self.student_ends - self.student_begins).sum())

    def first(self, count: int) -> Chunks:
        """Only so many."""
        return Chunks(
            student_begins=self.student_begins[:count],
            student_ends=self.student_ends[:count],
            teacher_begins=self.teacher_begins[:count],
            teacher_ends=self.teacher_ends[:count],
        )

    def shifted(self, student: int, teacher: int) -> Chunks:
        """The same, so many rows later."""
        return Chunks(
            student_begins=self.student_begins + student,
            student_ends=self.student_ends + student,
            teacher_begins=self.teacher_begins + teacher,
            teacher_ends=self.teacher_ends + teacher,
        )

    @classmethod
    def joined(cls, parts: Sequence[Chunks]) -> Chunks:
        """One after the other."""

        def join(pick: Callable[[Chunks], Int32Array]) -> Int32Array:
            return np.concatenate([np.empty(0, np.int32), *map(pick, parts)]).astype(np.int32)

        return cls(
            student_begins=join(lambda part: part.student_begins),
            student_ends=join(lambda part: part.student_ends),
            teacher_begins=join(lambda part: part.teacher_begins),
            teacher_ends=join(lambda part: part.teacher_ends),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InChunks(TokenSequence):
    """A sequence as the student's tokenizer has it, the same text as the teacher's has it, and what is alike in both.

    Raises:
        InvalidRequest: a chunk has a row that is not there.
    """

    teacher: TokenSequence
    chunks: Chunks

    def __post_init__(self) -> None:
        TokenSequence.__post_init__(self)
        for whose, rows, begins, ends in (
            ("student", self.num_rows, self.chunks.student_begins, self.chunks.student_ends),
            ("teacher", self.teacher.num_rows, self.chunks.teacher_begins, self.chunks.teacher_ends),
        ):
            edges = np.stack([begins, ends], axis=1).ravel()
            if len(edges) and not (
                edges[0] >= 0 and edges[-1] <= rows and (np.diff(edges) >= 0).all() and (ends > begins).all()
            ):
                raise InvalidRequest(f"chunks are not runs of the {whose}'s {rows} rows, in order")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """What is asked, and what is right."""

    chat: Chat  # up to the turn that is wanted: no answer is in it
    answers: tuple[str, ...]  # none of them blank; any is right; empty where nothing is held against them
    row: Mapping[str, Any]  # all that the file says of it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """What a response follows."""

    token_ids: Int32Array  # [P], P >= 1
    teacher_ids: Int32Array | None = None  # what it follows for the teacher; None: the same
    images: tuple[PlacedImage, ...] = ()
    teacher_images: tuple[PlacedImage, ...] = ()  # where there are teacher_ids
    teacher_name: str = ""  # of the one of several that is asked; empty: all are, or there is one
    chat: Chat | None = None  # that the prompt is of, where the teacher's template renders it with the response
    question: Question | None = None  # what responses are judged by; None: nobody judges them by their row


def teacher_side(sequences: Sequence[TokenSequence]) -> tuple[TokenSequence, ...]:
    """The sequences as the teacher reads them."""
    return tuple(s.teacher if isinstance(s, InContext | Aligned | InChunks) else s for s in sequences)


class TeacherSide(Lazy[TokenSequence]):
    """The sequences of a dataset as the teacher reads them, each made when it is looked at."""

    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def item(self, number: int) -> TokenSequence:
        """See Lazy."""
        [theirs] = teacher_side([self._sequences[number]])
        return theirs


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


def aligned_rows(sequence: TokenSequence) -> int:
    """How many of its rows are compared with the teacher's."""
    if isinstance(sequence, InChunks):
        return sequence.chunks.num_student_rows
    return len(sequence.rows_A) if isinstance(sequence, Aligned) else sequence.num_rows


def first_rows(sequence: TokenSequence, count: int) -> TokenSequence | None:
    """The sequence cut after its first `count` loss tokens; None where the teacher would answer none of them."""
    positions = sequence.positions[:count].copy()  # copies, because a slice would keep the whole array alive
    token_ids = sequence.token_ids[: positions[-1] + 2].copy()
    images = tuple(image for image in sequence.images if image.end <= len(token_ids))
    if isinstance(sequence, Aligned):
        rows_A = sequence.rows_A[sequence.rows_A < count].copy()
        answers = first_rows(sequence.teacher, len(rows_A)) if len(rows_A) else None
        if answers is None:
            return None
        return replace(
            sequence, token_ids=token_ids, positions=positions, images=images, teacher=answers, rows_A=rows_A
        )
    if isinstance(sequence, InChunks):
        chunks = sequence.chunks.first(int((sequence.chunks.student_ends <= count).sum()))
        if len(chunks.teacher_ends) == 0:
            return None
        answers = first_rows(sequence.teacher, int(chunks.teacher_ends[-1]))
        assert answers is not None
        return replace(
            sequence, token_ids=token_ids, positions=positions, images=images, teacher=answers, chunks=chunks
        )
    if isinstance(sequence, InContext):
        teacher = first_rows(sequence.teacher, count)
        assert teacher is not None
        return replace(sequence, token_ids=token_ids, positions=positions, images=images, teacher=teacher)
    return replace(sequence, token_ids=token_ids, positions=positions, images=images)


def some_rows(sequence: TokenSequence, rows: slice) -> TokenSequence:
    """The same tokens with only these of their loss tokens, at least one."""
    assert not isinstance(sequence, Aligned | InChunks), "some of the teacher's rows answer to none or to several"
    positions = sequence.positions[rows]
    if isinstance(sequence, InContext):
        return replace(sequence, positions=positions, teacher=some_rows(sequence.teacher, rows))
    return replace(sequence, positions=positions)


def addressed(sequence: TokenSequence, teacher_name: str) -> TokenSequence:
    """The sequence, of which that teacher is asked."""
    if isinstance(sequence, InContext):
        return replace(sequence, teacher=addressed(sequence.teacher, teacher_name))
    return Addressed(
        token_ids=sequence.token_ids,
        positions=sequence.positions,
        images=sequence.images,
        weight=sequence.weight,
        teacher_name=teacher_name,
    )
