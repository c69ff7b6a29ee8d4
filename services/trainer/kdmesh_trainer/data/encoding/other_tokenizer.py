"""Encodes chats for a teacher that has another tokenizer than the student."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kdmesh.alignment.boundaries import BoundaryTokens, boundary_tokens
from kdmesh.alignment.chunks import align
from kdmesh.alignment.spans import Spans, spans_of_ids
from kdmesh.alignment.token_bytes import token_bytes
from kdmesh.alignment.vocabularies import shared_tokens
from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.errors import ConfigError
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.types import Int32Array, TokenSequence
from kdmesh_trainer.data.encoding.chat import ChatEncoder, without_answers
from kdmesh_trainer.data.encoding.sides import Aligned, Chunks, InChunks, Prompt, first_rows
from kdmesh_trainer.data.encoding.tokenizer import TeacherTokens, vocabulary_size
from kdmesh_trainer.data.encoding.turns import Reason, Unusable

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
    ends the turn on both sides. With `takes_chunks` so has one that is in the shortest run of tokens which are the same
    bytes on both sides.

    Attributes:
        shared: the tokens that distributions are compared over.
        teacher_tokenizer: whose ids the teacher's side has.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerFast,
        teacher: PreTrainedTokenizerFast,
        *,
        takes_chunks: bool = False,
        only_last: bool = False,
    ) -> None:
        """
        Args:
            takes_chunks: match also what is several tokens on a side, so that sequences become InChunks.
            only_last: as ChatEncoder's.

        Raises:
            ConfigError: a template is missing, or a tokenizer is of a kind whose tokens are not the text.
        """
        self.teacher_tokenizer = teacher
        self._takes_chunks = takes_chunks
        self._student = ChatEncoder(student, only_last=only_last)
        self._teacher = ChatEncoder(teacher, only_last=only_last)
        self._student_bytes, self._teacher_bytes = _bytes_of("student", student), _bytes_of("teacher", teacher)
        ends = self._student.end_of_turn(), self._teacher.end_of_turn()
        also = [] if ends[0] is None or ends[1] is None else [(ends[0], ends[1])]
        self.shared = shared_tokens(self._student_bytes, self._teacher_bytes, also=also)
        self._end_of_turn = also
        self._their_end = ends[1]

    def of_single_tokens(self) -> OtherTokenizerEncoder:
        """The same one, but for what is one token on both sides alone: rows to compare distributions over."""
        other = copy.copy(self)
        other._takes_chunks = False
        return other

    def teacher_tokens(self, *, with_boundaries: bool = False) -> TeacherTokens:
        """What the teacher must have.

        Raises:
            ConfigError: `with_boundaries`, and the vocabularies have no byte in common that only begins tokens.
        """
        tokenizer = self.teacher_tokenizer
        return TeacherTokens(
            fingerprint=tokenizer_fingerprint(tokenizer.get_vocab()),
            size=vocabulary_size(tokenizer),
            shared=self.shared,
            boundaries=self._boundaries() if with_boundaries else None,
        )

    def encode(self, chats: Sequence[Chat]) -> list[list[TokenSequence] | Unusable]:
        """For each chat its sequences, or why there are none; its last one alone where the templates differ in more.

        (One may leave out the thinking of earlier turns, so that the chat is several sequences for it.)
        """
        whole = [
            self._pair(*each) for each in zip(self._student.encode(chats), self._teacher.encode(chats), strict=True)
        ]
        again = [number for number, found in enumerate(whole) if found is None]
        some = [_to_last_trained(chats[number]) for number in again]
        last = zip(self._student.encode_last_turns(some), self._teacher.encode_last_turns(some), strict=True)
        for number, (own, theirs) in zip(again, last, strict=True):
            whole[number] = self._pair(_listed(own), _listed(theirs))
        nothing = Unusable(reason=Reason.OTHER_RESPONSE, detail="no token is one token on both sides")
        return [nothing if found is None else found for found in whole]

    def encode_prompts(self, chats: Sequence[Chat]) -> list[Prompt | Unusable]:
        """For each chat what precedes the turn that comes next, for student and teacher, or why there is nothing."""
        both = zip(chats, self._student.encode_prompts(chats), self._teacher.encode_prompts(chats), strict=True)
        return [self._prompt(*each) for each in both]

    def end_of_turn(self) -> int | None:
        """The student's, as ChatEncoder."""
        return self._student.end_of_turn()

    def read_response(
        self, prompt: Prompt, own: TokenSequence, *, max_tokens: int, max_rows: int
    ) -> Aligned | InChunks:
        """The student's response to a prompt, and the same text as the teacher has it; its ids stay as they are.

        The teacher reads its own template's rendering of the chat with the response in it; where that refuses, its
        prompt, and then the response. Where nothing of the two is alike the teacher is asked for its first token.

        Args:
            prompt: of `encode_prompts`.
            own: the prompt and the response, which alone carries loss.
            max_tokens: that the teacher takes; what is beyond them is not matched.
            max_rows: likewise.
        """
        labels = own.labels
        _, read = _readable(labels, self._student_bytes)
        text = read.decode()
        theirs = self._rendered(prompt, text) or self._appended(prompt, text)
        num_rows = min(int((theirs.positions <= max_tokens - 2).sum()), max_rows)
        cut = first_rows(theirs, num_rows)
        assert cut is not None
        found = self._with_answers(own, cut, self._alike(labels, cut.labels))
        if found is not None:
            return found
        first = first_rows(theirs, 1)
        assert first is not None
        if self._takes_chunks:
            return InChunks(token_ids=own.token_ids, positions=own.positions, teacher=first, chunks=Chunks.joined([]))
        # Whatever was drawn, both predict it from the prompt alone.
        rows_A = np.zeros(1, np.int32)
        return Aligned(token_ids=own.token_ids, positions=own.positions, teacher=first, rows_A=rows_A)

    def aligned_fraction(self, texts: Sequence[str]) -> float:
        """Part of the student's tokens of these texts that would be compared with the teacher's."""
        aligned = total = 0
        for text in texts:
            own, theirs = (np.asarray(side.encode_text(text), np.int32) for side in (self._student, self._teacher))
            if len(own) and len(theirs):
                aligned += self._alike(own, theirs).num_student_rows
                total += len(own)
        return aligned / total if total else 0.0

    def _boundaries(self) -> BoundaryTokens:
        found = boundary_tokens(self._student_bytes, self._teacher_bytes, ends=self._end_of_turn)
        if found is None:
            raise ConfigError(
                "objective.algorithm.debias_above needs whitespace that no token of either tokenizer has behind other "
                "bytes; these two have none"
            )
        return found

    def _prompt(self, chat: Chat, own: Prompt | Unusable, theirs: Prompt | Unusable) -> Prompt | Unusable:
        if isinstance(own, Unusable):
            return own
        if isinstance(theirs, Unusable):
            return replace(theirs, detail=f"for the teacher: {theirs.detail}")
        leading = replace(chat, messages=without_answers(chat.messages))
        return Prompt(token_ids=own.token_ids, teacher_ids=theirs.token_ids, chat=leading)

    def _rendered(self, prompt: Prompt, text: str) -> TokenSequence | None:
        """The chat with the response as the teacher's template has it."""
        assert prompt.chat is not None
        response = Message(role="assistant", content=text)
        chat = replace(prompt.chat, messages=(*prompt.chat.messages, response))
        [found] = self._teacher.encode_last_turns([chat])
        return None if isinstance(found, Unusable) else found

    def _appended(self, prompt: Prompt, text: str) -> TokenSequence:
        """The response behind the teacher's prompt, and the end of the turn."""
        assert prompt.teacher_ids is not None
        ids = self._teacher.encode_text(text)
        if self._their_end is not None or not ids:
            ids = [*ids, self._their_end or 0]  # what it is does not matter where nothing else is there
        token_ids = np.concatenate([prompt.teacher_ids, np.asarray(ids, np.int32)])
        positions = np.arange(len(prompt.teacher_ids) - 1, len(token_ids) - 1, dtype=np.int32)
        return TokenSequence(token_ids=token_ids, positions=positions)

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

    def _aligned(self, own: TokenSequence, theirs: TokenSequence) -> Aligned | InChunks | None:
        own_turns, their_turns = _turns(own), _turns(theirs)
        if len(own_turns) != len(their_turns):
            return None
        chunks = Chunks.joined(
            [
                self._alike(one.labels, other.labels).shifted(one.first_row, other.first_row)
                for one, other in zip(own_turns, their_turns, strict=True)
            ]
        )
        return self._with_answers(own, theirs, chunks)

    def _with_answers(self, own: TokenSequence, theirs: TokenSequence, chunks: Chunks) -> Aligned | InChunks | None:
        """The student's sequence with the rows of the teacher's that chunks have; None: there are none."""
        if len(chunks.student_begins) == 0:
            return None
        answered = TokenSequence(
            token_ids=theirs.token_ids[: theirs.positions[chunks.teacher_ends[-1] - 1] + 2].copy(),
            positions=theirs.positions[_members(chunks.teacher_begins, chunks.teacher_ends)],
        )
        if not self._takes_chunks:
            rows_A = chunks.student_begins
            return Aligned(token_ids=own.token_ids, positions=own.positions, teacher=answered, rows_A=rows_A)
        ends = np.cumsum(chunks.teacher_ends - chunks.teacher_begins, dtype=np.int32)
        begins = np.concatenate([np.zeros(1, np.int32), ends[:-1]])
        asked = replace(chunks, teacher_begins=begins, teacher_ends=ends)
        return InChunks(token_ids=own.token_ids, positions=own.positions, teacher=answered, chunks=asked)

    def _alike(self, own: Int32Array, theirs: Int32Array) -> Chunks:
        """What is the same bytes in a turn's loss tokens; without `takes_chunks` only what is one token in both."""
        (own_spans, own_text), (their_spans, their_text) = (
            _readable(own, self._student_bytes),
            _readable(theirs, self._teacher_bytes),
        )
        found = align(own_spans, own_text, their_spans, their_text, most_tokens=_MOST_TOKENS)
        edges = np.stack([found.student_begins, found.student_ends, found.teacher_begins, found.teacher_ends])
        # Likelihoods of chunks are pulled together, so what is read as nothing inside of one would become likelier.
        kept = _are_read(edges[0], edges[1], own_spans, self._student_bytes)
        kept &= _are_read(edges[2], edges[3], their_spans, self._teacher_bytes)
        if not self._takes_chunks:
            kept &= found.is_single
        edges = edges[:, kept]
        ends_alike = [(int(own[-1]), int(theirs[-1]))] == self._end_of_turn
        if ends_alike and own_text[-1:] == their_text[-1:]:
            last = [[len(own) - 1], [len(own)], [len(theirs) - 1], [len(theirs)]]
            edges = np.concatenate([edges, last], axis=1)
        return Chunks(
            **dict(
                zip(
                    ("student_begins", "student_ends", "teacher_begins", "teacher_ends"),
                    edges.astype(np.int32),
                    strict=True,
                )
            )
        )


def _readable(token_ids: Int32Array, table: Sequence[bytes | None]) -> tuple[Spans, bytes]:
    """As spans_of_ids, without bytes that are no UTF-8: a student may draw some, and nobody can be told them."""
    spans, text = spans_of_ids(token_ids, table)
    is_read = np.ones(len(text), dtype=np.bool_)
    begin = 0
    while begin < len(text):
        try:
            text[begin:].decode()
        except UnicodeDecodeError as error:
            is_read[begin + error.start : begin + error.end] = False
            begin += error.end
        else:
            break
    read_before = np.concatenate([np.zeros(1, np.int32), np.cumsum(is_read, dtype=np.int32)])
    return replace(spans, ends=read_before[spans.ends]), text.decode(errors="ignore").encode()


def _are_read(
    begins: Int32Array, ends: Int32Array, read: Spans, table: Sequence[bytes | None]
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """[C] whether each token from begins[c] to ends[c] has bytes, and all of them were read."""
    read_bytes = np.diff(read.ends, prepend=0)
    all_bytes = np.diff(spans_of_ids(read.token_ids, table)[0].ends, prepend=0)
    bad_before = np.concatenate([np.zeros(1, np.int64), np.cumsum((read_bytes == 0) | (read_bytes < all_bytes))])
    are_read: np.ndarray[tuple[int], np.dtype[np.bool_]] = bad_before[ends] == bad_before[begins]
    return are_read


def _members(begins: Int32Array, ends: Int32Array) -> Int32Array:
    """Every number in any of these ranges, in order."""
    return np.concatenate([np.arange(begin, end, dtype=np.int32) for begin, end in zip(begins, ends, strict=True)])


def _bytes_of(whose: str, tokenizer: PreTrainedTokenizerFast) -> list[bytes | None]:
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        raise ConfigError(f"the {whose}'s tokenizer is a WordPiece one, whose tokens are not the text: spaces are lost")
    return token_bytes(tokenizer)


def _turns(sequence: TokenSequence) -> list[_Turn]:
    """A turn is a run of positions without a gap."""
    begins = np.flatnonzero(np.diff(sequence.positions, prepend=-2) != 1)
    parts = np.split(sequence.labels, begins[1:])
    return [_Turn(first_row=int(begin), labels=labels) for begin, labels in zip(begins, parts, strict=True)]


def _to_last_trained(chat: Chat) -> Chat:
    """Up to the last turn that carries loss; there is one."""
    last = max(n for n, message in enumerate(chat.messages) if message.role == "assistant" and message.is_trained)
    return replace(chat, messages=chat.messages[: last + 1])


def _listed(found: TokenSequence | Unusable) -> list[TokenSequence] | Unusable:
    return found if isinstance(found, Unusable) else [found]
