"""Encodes chats for a teacher that has another tokenizer than the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kdmesh.alignment.chunks import align
from kdmesh.alignment.spans import spans_of_ids
from kdmesh.alignment.token_bytes import token_bytes
from kdmesh.alignment.vocabularies import shared_tokens
from kdmesh.errors import ConfigError
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.types import Int32Array, TokenSequence
from kdmesh_trainer.sources.chat import ChatEncoder
from kdmesh_trainer.sources.rows import Chat
from kdmesh_trainer.sources.sides import Aligned
from kdmesh_trainer.sources.tokenizer import TeacherTokens, vocabulary_size
from kdmesh_trainer.sources.turns import Reason, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A token of one side that is one token of the other needs no more; longer runs only tell where the texts go on.
_MOST_TOKENS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Turn:
    """The loss tokens of one assistant turn."""

    first_row: int
    labels: Int32Array


class OtherTokenizerEncoder:
    """Encodes every chat under both tokenizers, each with its own template, and matches the assistant turns.

    A loss token has a row of the teacher where it is one token on both sides, for the same bytes of the same turn, or
    ends the turn on both sides.

    Attributes:
        shared: the tokens that distributions are compared over.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerFast,
        student_template: str | None,
        teacher: PreTrainedTokenizerFast,
        teacher_template: str | None,
    ) -> None:
        """
        Raises:
            ConfigError: a template is missing, or a tokenizer is of a kind whose tokens are not the text.
        """
        self._teacher_tokenizer = teacher
        self._student = ChatEncoder(student, student_template)
        self._teacher = ChatEncoder(teacher, teacher_template)
        self._student_bytes, self._teacher_bytes = _bytes_of("student", student), _bytes_of("teacher", teacher)
        ends = self._student.end_of_turn(), self._teacher.end_of_turn()
        also = [] if ends[0] is None or ends[1] is None else [(ends[0], ends[1])]
        self.shared = shared_tokens(self._student_bytes, self._teacher_bytes, also=also)
        self._end_of_turn = also

    def teacher_tokens(self) -> TeacherTokens:
        """What the teacher must have."""
        tokenizer = self._teacher_tokenizer
        fingerprint = tokenizer_fingerprint(tokenizer.get_vocab())
        return TeacherTokens(fingerprint=fingerprint, size=vocabulary_size(tokenizer), shared=self.shared)

    def encode(self, chats: Sequence[Chat]) -> list[list[TokenSequence] | Unusable]:
        """For each chat its sequences, or why there are none; the last turn alone where the templates differ in more.

        (One may leave out the thinking of earlier turns, so that the chat is several sequences for it.)
        """
        whole = [
            self._pair(*each) for each in zip(self._student.encode(chats), self._teacher.encode(chats), strict=True)
        ]
        again = [number for number, found in enumerate(whole) if found is None]
        some = [chats[number] for number in again]
        last = zip(self._student.encode_last_turns(some), self._teacher.encode_last_turns(some), strict=True)
        for number, (own, theirs) in zip(again, last, strict=True):
            whole[number] = self._pair(_listed(own), _listed(theirs))
        nothing = Unusable(reason=Reason.OTHER_RESPONSE, detail="no token is one token on both sides")
        return [nothing if found is None else found for found in whole]

    def _pair(
        self, own: list[TokenSequence] | Unusable, theirs: list[TokenSequence] | Unusable
    ) -> list[TokenSequence] | Unusable | None:
        """None: they do not have the same turns, or nothing of them in common."""
        if isinstance(own, Unusable):
            return own
        if isinstance(theirs, Unusable):
            return replace(theirs, detail=f"for the teacher: {theirs.detail}")
        if len(own) != len(theirs):
            return None
        aligned = [self._aligned(one, other) for one, other in zip(own, theirs, strict=True)]
        found = [sequence for sequence in aligned if sequence is not None]
        return list(found) if len(found) == len(own) else None

    def _aligned(self, own: TokenSequence, theirs: TokenSequence) -> Aligned | None:
        own_turns, their_turns = _turns(own), _turns(theirs)
        if len(own_turns) != len(their_turns):
            return None
        pairs = [
            np.array([[one.first_row], [other.first_row]]) + self._same_tokens(one.labels, other.labels)
            for one, other in zip(own_turns, their_turns, strict=True)
        ]
        own_A, their_A = np.concatenate(pairs, axis=1).astype(np.int32)
        if len(own_A) == 0:
            return None
        answered = TokenSequence(
            token_ids=theirs.token_ids[: theirs.positions[their_A[-1]] + 2].copy(),
            positions=theirs.positions[their_A],
        )
        return Aligned(token_ids=own.token_ids, positions=own.positions, teacher=answered, rows_A=own_A)

    def _same_tokens(self, own: Int32Array, theirs: Int32Array) -> Int32Array:
        """[2, A] the loss tokens of a turn that are one token on both sides: the student's, and the teacher's."""
        (own_spans, own_text), (their_spans, their_text) = (
            spans_of_ids(own, self._student_bytes),
            spans_of_ids(theirs, self._teacher_bytes),
        )
        found = align(own_spans, own_text, their_spans, their_text, most_tokens=_MOST_TOKENS)
        pairs = np.stack([found.student_begins, found.teacher_begins])[:, found.is_single]
        ends_alike = [(int(own[-1]), int(theirs[-1]))] == self._end_of_turn
        if ends_alike and own_text[-1:] == their_text[-1:]:
            pairs = np.concatenate([pairs, [[len(own) - 1], [len(theirs) - 1]]], axis=1)
        return pairs.astype(np.int32)


def _bytes_of(whose: str, tokenizer: PreTrainedTokenizerFast) -> list[bytes | None]:
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        raise ConfigError(f"the {whose}'s tokenizer is a WordPiece one, whose tokens are not the text: spaces are lost")
    return token_bytes(tokenizer)


def _turns(sequence: TokenSequence) -> list[_Turn]:
    """A turn is a run of positions without a gap."""
    begins = np.flatnonzero(np.diff(sequence.positions, prepend=-2) != 1)
    parts = np.split(sequence.labels, begins[1:])
    return [_Turn(first_row=int(begin), labels=labels) for begin, labels in zip(begins, parts, strict=True)]


def _listed(found: TokenSequence | Unusable) -> list[TokenSequence] | Unusable:
    return found if isinstance(found, Unusable) else [found]
