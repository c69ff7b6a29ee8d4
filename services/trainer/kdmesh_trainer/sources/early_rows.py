"""Asks a teacher for the rows of a sample as soon as it has come, while others of its step are still drawn."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdmesh.errors import KdmeshError, ModelMismatch
from kdmesh.tokens import digest
from kdmesh.types import TokenSequence
from kdmesh_trainer.sources.batches import AskedRows, TeacherRows
from kdmesh_trainer.sources.row_queue import RowService


class KeptRows(AskedRows, Protocol):
    """Rows that are kept by this process until they are waited for."""

    @property
    def has_failed(self) -> bool:
        """Whether it is known that they will not come."""
        ...

    def wait(self) -> TeacherRows:
        """See PendingRows; always of one teacher."""
        ...


class KeepingService(Protocol):
    """Where a teacher's rows come from, also such that nobody will wait for soon."""

    def submit(self, sequences: Sequence[TokenSequence], *, keep: bool = False) -> KeptRows:
        """Ask for the rows of a group of sequences, as the teacher reads them, in their order. Does not block.

        Args:
            keep: copy them to memory of this process as they come, because the teacher's is short.

        Raises:
            InvalidRequest: one exceeds the teacher's limits.
        """
        ...


class EarlyService(RowService, Protocol):
    """A RowService that may be asked for the rows of a sample before its micro-batch is known."""

    def add(self, step: int, sequence: TokenSequence) -> None:
        """A sample of that step, as the teacher reads it, has come. Any thread; does not block for long."""
        ...

    def allow(self, until: float) -> None:
        """The teacher has the weights for the steps before `until`."""
        ...

    def settle(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Of the samples of that step only these will be submitted; others are wanted no more."""
        ...

    def close(self) -> None:
        """Drop what nobody has taken: that cancels it. Nothing is asked for early any more."""
        ...


class EarlyRows:
    """A RowService in which rows may be under way, or here, before anybody asks for them.

    Samples come in any thread and any order; each is asked for by itself. At most `most_rows` are asked for that
    nobody has taken; what comes beyond them waits until there is room, or is asked for when it is submitted.
    Whether a sample was early changes when its rows come, and nothing else.
    """

    def __init__(self, teacher: KeepingService, *, most_rows: int, is_frozen: bool) -> None:
        """
        Args:
            is_frozen: the teacher's weights stay as they are, else nothing is asked for before `allow`.
        """
        self._teacher = teacher
        self._room = most_rows
        self._until: float = float("inf") if is_frozen else 0  # steps from this one on wait for the teacher's weights
        self._lock = threading.Lock()
        self._waiting: deque[_Early] = deque()
        self._asked: dict[bytes, deque[_Early]] = {}  # by the digest of the one sequence; as they were asked for

    def add(self, step: int, sequence: TokenSequence) -> None:
        """See EarlyService."""
        with self._lock:
            self._waiting.append(_Early(step, sequence))
            self._ask()

    def allow(self, until: float) -> None:
        """See EarlyService."""
        with self._lock:
            self._until = until
            self._ask()

    def settle(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """See EarlyService."""
        with self._lock:
            self._waiting = deque(early for early in self._waiting if early.step != step)
            wanted = Counter(digest([sequence]) for sequence in sequences)
            asked, self._asked = self._asked, {}
            for key, earlies in asked.items():
                for early in earlies:
                    if early.step == step and wanted[key] == 0:
                        self._room += early.sequence.num_rows
                        continue
                    if early.step == step:
                        wanted[key] -= 1
                    self._asked.setdefault(key, deque()).append(early)
            self._ask()

    def submit(self, sequences: Sequence[TokenSequence]) -> AskedRows:
        """See RowService; what is not under way already is asked for in one request."""
        early = [self._take(sequence) for sequence in sequences]
        missing = [sequence for sequence, rows in zip(sequences, early, strict=True) if rows is None]
        asked = self._teacher.submit(missing) if missing else None
        if len(missing) == len(sequences):
            assert asked is not None
            return asked
        return _JoinedRows(early, asked, [sequence.num_rows for sequence in missing])

    def close(self) -> None:
        """See EarlyService."""
        with self._lock:
            self._until = 0
            self._waiting.clear()
            self._asked.clear()

    def _take(self, sequence: TokenSequence) -> KeptRows | None:
        """The rows of a sequence, if they are here or on their way."""
        key = digest([sequence])
        with self._lock:
            found = self._asked.get(key)
            if not found:
                return None
            early = found.popleft()
            if not found:
                del self._asked[key]
            self._room += sequence.num_rows
            self._ask()
            assert early.rows is not None
            return None if early.rows.has_failed else early.rows

    def _ask(self) -> None:
        """Ask for what waits and may be asked for, in order, as far as there is room; with the lock."""
        for early in [early for early in self._waiting if early.step < self._until]:
            if early.sequence.num_rows > self._room:
                return
            self._waiting.remove(early)
            try:
                early.rows = self._teacher.submit([early.sequence], keep=True)
            except KdmeshError:
                continue  # whoever submits it is told
            self._room -= early.sequence.num_rows
            self._asked.setdefault(digest([early.sequence]), deque()).append(early)


class _Early:
    """A sample that has come."""

    def __init__(self, step: int, sequence: TokenSequence) -> None:
        self.step = step
        self.sequence = sequence
        self.rows: KeptRows | None = None  # once it is asked for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Joined:
    """Rows of several answers."""

    rows_RD: Tensor
    weight_version: int


class _JoinedRows:
    """Rows of a group that come in several answers."""

    def __init__(self, early: Sequence[KeptRows | None], asked: KeptRows | None, asked_rows: Sequence[int]) -> None:
        """
        Args:
            early: for each sequence its own answer; None: it is in `asked`.
            asked: the answer to all other sequences, in order.
            asked_rows: of each of those.
        """
        self._early = early
        self._asked = asked
        self._asked_rows = asked_rows

    @property
    def is_done(self) -> bool:
        """See AskedRows."""
        return all(rows is None or rows.is_done for rows in (*self._early, self._asked))

    def wait(self) -> TeacherRows:
        """See PendingRows."""
        answers = [None if rows is None else rows.wait() for rows in self._early]
        # Last: its memory may be the teacher's only slot, and the others need one until they are kept.
        asked = None if self._asked is None else self._asked.wait()
        parts = iter(() if asked is None else torch.split(asked.rows_RD, list(self._asked_rows)))
        versions = {answer.weight_version for answer in (asked, *answers) if answer is not None}
        if len(versions) > 1:
            raise ModelMismatch(
                f"the teacher's rows of one micro-batch have weight versions {sorted(versions)}; a step mixes none"
            )
        pieces = [next(parts) if answer is None else answer.rows_RD for answer in answers]
        rows_RD = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return _Joined(rows_RD=rows_RD, weight_version=versions.pop())
