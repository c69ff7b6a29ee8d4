"""Reads a dataset into token sequences, under the policies of the configuration."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from kdmesh.chats.chat_rows import Chat
from kdmesh.errors import DataError
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.sides import addressed, first_rows
from kdmesh_trainer.data.encoding.turns import Unusable
from kdmesh_trainer.data.files.readers import Reader, groups_of
from kdmesh_trainer.data.reading_progress import reading_told
from kdmesh_trainer.sections.data_config import DataConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of a dataset."""

    rows: int
    sequences: int
    truncated: int
    dropped_too_long: int  # also those that had no loss token left after truncation
    unusable: dict[str, int]  # rows left out, by reason
    tokens: int
    loss_tokens: int
    of_weight_0: int = 0  # rows left out for that

    def plus(self, other: DataReport) -> DataReport:
        """That of both."""
        return DataReport(
            rows=self.rows + other.rows,
            sequences=self.sequences + other.sequences,
            truncated=self.truncated + other.truncated,
            dropped_too_long=self.dropped_too_long + other.dropped_too_long,
            unusable=dict(Counter(self.unusable) + Counter(other.unusable)),
            tokens=self.tokens + other.tokens,
            loss_tokens=self.loss_tokens + other.loss_tokens,
            of_weight_0=self.of_weight_0 + other.of_weight_0,
        )

    def tell(self, name: str, **facts: object) -> None:
        """Log it as that of dataset `name`. Raises DataError when nothing is left to train on."""
        log.info("dataset read", extra={"dataset": name, **asdict(self), **facts})
        if not self.sequences:
            counts = {
                **self.unusable,
                "too long for data.max_tokens": self.dropped_too_long,
                "of weight 0": self.of_weight_0,
            }
            losses = ", ".join(f"{count} x {reason}" for reason, count in counts.items() if count)
            raise DataError(f"dataset {name}: none of {self.rows} rows can be trained on: {losses}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The sequences of a dataset, in its order."""

    sequences: list[TokenSequence]
    report: DataReport


class SequenceEncoder(Protocol):
    """Turns chats into sequences."""

    def encode(self, chats: Sequence[Chat]) -> list[list[TokenSequence] | Unusable]:
        """For each chat its sequences, or why there are none."""
        ...


def load_sequences(
    name: str,
    reader: Reader,
    encoder: SequenceEncoder,
    policy: DataConfig,
    *,
    max_sequences: int | None = None,
) -> Dataset:
    """Read, encode and cut a dataset; what was left out is counted and logged.

    Args:
        name: for logs and errors: train or held_out.
        max_sequences: stop after so many; None reads all.

    Raises:
        DataError: a row is refused, or one is too long or unusable and the policy says fail,
            or nothing is left.
    """
    dataset = encode_chats(reading_told(name, reader()), encoder, policy, max_sequences=max_sequences)
    dataset.report.tell(name)
    return dataset


def encode_chats(
    chats: Iterable[Chat],
    encoder: SequenceEncoder,
    policy: DataConfig,
    *,
    max_sequences: int | None = None,
) -> Dataset:
    """The sequences of some chats, of which there may be none; arguments and errors are those of load_sequences."""
    intake = _Intake(policy)
    for group in groups_of(chats):
        for chat, encoded in zip(group, encoder.encode(group), strict=True):
            intake.add(chat, encoded)
        if max_sequences is not None and len(intake.sequences) >= max_sequences:
            break
    return intake.dataset(max_sequences)


class _Intake:
    """Applies the policies to one row after the other."""

    def __init__(self, policy: DataConfig) -> None:
        self._policy = policy
        self.rows = 0
        self.sequences: list[TokenSequence] = []
        self._truncated = 0
        self._dropped_too_long = 0
        self._unusable: Counter[str] = Counter()
        self._of_weight_0 = 0

    def add(self, chat: Chat, encoded: list[TokenSequence] | Unusable) -> None:
        """Take what can be taken of a row."""
        self.rows += 1
        if chat.weight == 0:
            self._of_weight_0 += 1
        elif not isinstance(encoded, Unusable):
            for sequence in encoded:
                self._add_sequence(chat, sequence)
        elif self._policy.unusable == "fail":
            raise DataError(
                f"{chat.origin}: {encoded.reason} ({encoded.detail}); `data.unusable: drop` leaves such rows out"
            )
        else:
            self._unusable[encoded.reason.value] += 1

    def dataset(self, max_sequences: int | None) -> Dataset:
        """What was taken, the first `max_sequences` of it."""
        sequences = self.sequences[:max_sequences]
        report = DataReport(
            rows=self.rows,
            sequences=len(sequences),
            truncated=self._truncated,
            dropped_too_long=self._dropped_too_long,
            unusable=dict(self._unusable),
            tokens=sum(sequence.num_tokens for sequence in sequences),
            loss_tokens=sum(sequence.num_rows for sequence in sequences),
            of_weight_0=self._of_weight_0,
        )
        return Dataset(sequences=sequences, report=report)

    def _add_sequence(self, chat: Chat, sequence: TokenSequence) -> None:
        limit = self._policy.max_tokens
        if sequence.num_tokens <= limit:
            self._take(chat, sequence)
            return
        if self._policy.too_long == "fail":
            raise DataError(
                f"{chat.origin}: {sequence.num_tokens} tokens, and data.max_tokens is {limit}; "
                "`data.too_long: truncate` or `drop` goes on"
            )
        num_kept = int((sequence.positions <= limit - 2).sum())
        if self._policy.too_long == "drop" or num_kept == 0:
            self._dropped_too_long += 1
            return
        shorter = first_rows(sequence, num_kept)
        if shorter is None:
            self._dropped_too_long += 1
            return
        self._truncated += 1
        self._take(chat, shorter)

    def _take(self, chat: Chat, sequence: TokenSequence) -> None:
        if chat.weight != 1:
            sequence = replace(sequence, weight=chat.weight)
        self.sequences.append(addressed(sequence, chat.teacher_name) if chat.teacher_name else sequence)
