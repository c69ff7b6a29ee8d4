"""Refuses a teacher that does not fit the student, or data that does not fit the teacher."""

from __future__ import annotations

from collections.abc import Sequence

from kdmesh.errors import DataError, ModelMismatch
from kdmesh.types import ModelDescription, TokenSequence


def common_vocabulary(teacher: ModelDescription, *, tokenizer_fingerprint: str, vocabulary_size: int) -> int:
    """The number of real tokens that student and teacher share, whatever their heads are padded to.

    Args:
        tokenizer_fingerprint: of the student's tokenizer.
        vocabulary_size: real tokens of the student's tokenizer.

    Raises:
        ModelMismatch: the tokenizers differ, or the teacher has none to compare.
    """
    if not teacher.tokenizer_fingerprint:
        raise ModelMismatch(
            f"teacher {teacher.name} has no tokenizer in its model directory, so nothing proves that its token ids "
            f"mean what the student's do (fingerprint {tokenizer_fingerprint})"
        )
    if teacher.tokenizer_fingerprint != tokenizer_fingerprint:
        raise ModelMismatch(
            f"teacher {teacher.name} has another tokenizer (fingerprint {teacher.tokenizer_fingerprint}) than the "
            f"student (fingerprint {tokenizer_fingerprint}); distributions over different vocabularies cannot be "
            "compared token by token"
        )
    return min(teacher.head.vocabulary_size, vocabulary_size)


def check_requests(name: str, sequences: Sequence[TokenSequence], teacher: ModelDescription) -> None:
    """Return when the teacher takes every sequence of dataset `name` by itself; groups are split to its limits.

    Raises:
        DataError: one is too long or has too many loss tokens.
    """
    most_tokens = min(teacher.max_sequence_tokens, teacher.max_request_tokens)
    tokens = max(sequence.num_tokens for sequence in sequences)
    rows = max(sequence.num_rows for sequence in sequences)
    if tokens > most_tokens:
        raise DataError(
            f"dataset {name} has a sequence of {tokens} tokens, and teacher {teacher.name} takes at most "
            f"{most_tokens}; lower data.max_tokens, or raise the teacher's engine.max_batch_tokens"
        )
    if rows > teacher.max_request_rows:
        raise DataError(
            f"dataset {name} has a sequence of {rows} loss tokens, and one answer of teacher {teacher.name} holds "
            f"{teacher.max_request_rows}; lower data.max_tokens, or raise the teacher's slab.slot_mib"
        )
