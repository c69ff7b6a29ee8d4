"""Several teachers that are asked as one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.sides import Addressed
from kdmesh_trainer.sources.batches import AskedRows, PanelPart, PanelRows, copied
from kdmesh_trainer.sources.early_rows import EarlyService
from kdmesh_trainer.sources.row_queue import RowService


class Panel:
    """A RowService that asks each teacher for its own sequences of a group, or every one for all of them."""

    def __init__(self, teachers: Mapping[str, RowService], *, asks_all: bool) -> None:
        """
        Args:
            teachers: by name.
            asks_all: each teacher is asked for every sequence; else a sequence is Addressed to one of them.
        """
        self._teachers = teachers
        self._asks_all = asks_all

    def submit(self, sequences: Sequence[TokenSequence]) -> PendingPanel:
        """See RowService."""
        asks = []
        for name, teacher in self._teachers.items():
            members = [n for n, sequence in enumerate(sequences) if self._asks(name, sequence)]
            if members:
                own = [sequences[n] for n in members]
                asks.append(
                    _Ask(
                        name=name,
                        pending=teacher.submit(own),
                        index_R=None if len(own) == len(sequences) else _rows_of(members, sequences),
                        num_tokens=sum(sequence.num_tokens for sequence in own),
                    )
                )
        return PendingPanel(asks)

    def _asks(self, name: str, sequence: TokenSequence) -> bool:
        """Whether that teacher is asked for a sequence."""
        if self._asks_all:
            return True
        assert isinstance(sequence, Addressed)
        return sequence.teacher_name == name


class EarlyPanel(Panel):
    """An EarlyService of several teachers."""

    def __init__(self, teachers: Mapping[str, EarlyService], *, asks_all: bool) -> None:
        """As Panel's."""
        super().__init__(teachers, asks_all=asks_all)
        self._early = teachers

    def add(self, step: int, sequence: TokenSequence) -> None:
        """See EarlyService."""
        for name, teacher in self._early.items():
            if self._asks(name, sequence):
                teacher.add(step, sequence)

    def allow(self, until: float) -> None:
        """See EarlyService."""
        for teacher in self._early.values():
            teacher.allow(until)

    def settle(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """See EarlyService."""
        for name, teacher in self._early.items():
            teacher.settle(step, [sequence for sequence in sequences if self._asks(name, sequence)])

    def close(self) -> None:
        """See EarlyService."""
        for teacher in self._early.values():
            teacher.close()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ask:
    """What one teacher was asked for."""

    name: str
    pending: AskedRows
    index_R: Tensor | None
    num_tokens: int


class PendingPanel:
    """Rows that several teachers were asked for; see AskedRows."""

    def __init__(self, asks: list[_Ask]) -> None:
        self._asks = asks

    @property
    def is_done(self) -> bool:
        """See AskedRows."""
        return all(ask.pending.is_done for ask in self._asks)

    def wait(self) -> PanelRows:
        """Block for one after the other; what passes while the first is waited for is not counted for the second.

        No teacher's memory is held while another is waited for: who has that may wait for this.
        """
        asks, self._asks = self._asks, []
        parts = []
        while asks:
            ask = asks.pop(0)  # so that the rows' only owner is the caller
            began_s = time.perf_counter()
            rows = ask.pending.wait()
            assert not isinstance(rows, PanelRows), "a panel in a panel"
            if not all(other.pending.is_done for other in asks):
                rows = copied(rows, torch.device("cpu"))
            parts.append(
                PanelPart(
                    name=ask.name,
                    rows=rows,
                    index_R=ask.index_R,
                    num_tokens=ask.num_tokens,
                    wait_s=time.perf_counter() - began_s,
                )
            )
        return PanelRows(parts=tuple(parts))


def _rows_of(members: Sequence[int], sequences: Sequence[TokenSequence]) -> Tensor:
    """[R'] where the rows of the sequences `members` are among those of all."""
    begins = np.cumsum([0, *(sequence.num_rows for sequence in sequences)])
    return torch.from_numpy(np.concatenate([np.arange(begins[n], begins[n + 1]) for n in members]))
