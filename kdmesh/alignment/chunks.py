"""Matches the tokens of one text with those of another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from kdmesh.alignment.spans import Spans
from kdmesh.types import Int32Array

_LONGEST_COMPARED = 4000  # bytes of what differs; to compare them takes time in the square of their number
_SHORTEST_FOUND_AGAIN = 4  # bytes; fewer are equal by chance


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Alignment:
    """The shortest runs of tokens that stand for the same bytes on both sides, in order.

    Chunk c is the tokens student_begins[c] to student_ends[c], and likewise the teacher's. Both sides predict its
    first token from the same text, so these are positions whose distributions can be compared.
    """

    student_begins: Int32Array  # [C]
    student_ends: Int32Array  # [C]
    teacher_begins: Int32Array  # [C]
    teacher_ends: Int32Array  # [C]
    aligned_bytes: int  # of the student's text, in chunks

    @property
    def is_single(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """[C] whether the chunk is one token on both sides."""
        single: np.ndarray[tuple[int], np.dtype[np.bool_]] = (self.student_ends - self.student_begins == 1) & (
            self.teacher_ends - self.teacher_begins == 1
        )
        return single


def align(student: Spans, student_text: bytes, teacher: Spans, teacher_text: bytes, *, most_tokens: int) -> Alignment:
    """Chunks of the text that both have, in which no side has more than `most_tokens` tokens.

    Where the texts differ (a template that trims, a tokenizer that normalises) nothing is matched; behind that it
    goes on, because bytes are matched and not the tokens before them.
    """
    chunks: list[Int32Array] = []
    student_starts, teacher_starts = _starts(student), _starts(teacher)
    for begin, shift, length in _common(student_text, teacher_text):
        shared = np.intersect1d(student_starts, teacher_starts - shift)
        shared = shared[(shared >= begin) & (shared <= begin + length)]
        if len(shared) < 2:
            continue
        # Tokens without bytes begin no chunk and end none; inside one, of several tokens, they may be.
        found = np.stack(
            [
                np.searchsorted(student_starts, shared[:-1], "right") - 1,
                np.searchsorted(student_starts, shared[1:], "left"),
                np.searchsorted(teacher_starts, shared[:-1] + shift, "right") - 1,
                np.searchsorted(teacher_starts, shared[1:] + shift, "left"),
                np.diff(shared),
            ]
        )
        is_short = (found[1] - found[0] <= most_tokens) & (found[3] - found[2] <= most_tokens)
        chunks.append(found[:, is_short].astype(np.int32))
    columns = np.concatenate(chunks, axis=1) if chunks else np.empty((5, 0), dtype=np.int32)
    return Alignment(
        student_begins=columns[0],
        student_ends=columns[1],
        teacher_begins=columns[2],
        teacher_ends=columns[3],
        aligned_bytes=int(columns[4].sum()),
    )


def _starts(spans: Spans) -> Int32Array:
    """[N + 1] where each token begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, dtype=np.int32), spans.ends])


def _common(student: bytes, teacher: bytes) -> Iterator[tuple[int, int, int]]:
    """(begin in the student's text, how much further it is in the teacher's, length) of what both have, in order."""
    shorter = min(len(student), len(teacher))
    front = _num_equal(student[:shorter], teacher[:shorter])
    if front:
        yield 0, 0, front
    left = shorter - front
    back = _num_equal(student[::-1][:left], teacher[::-1][:left])
    mine, theirs = student[front : len(student) - back], teacher[front : len(teacher) - back]
    if mine and theirs and max(len(mine), len(theirs)) <= _LONGEST_COMPARED:
        for block in SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks():
            if block.size >= _SHORTEST_FOUND_AGAIN:
                yield front + block.a, block.b - block.a, block.size
    if back:
        yield len(student) - back, len(teacher) - len(student), back


def _num_equal(one: bytes, other: bytes) -> int:
    """Bytes that both, equally long, begin with."""
    differs = np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)
    return int(differs.argmax()) if differs.any() else len(one)
