"""Rows that a teacher does not give: the rank goes on with blank ones, so that all ranks leave the step together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdmesh.errors import RpcError
from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sources.batches import CopiedRows, TeacherRows
from kdmesh_trainer.sources.early_rows import KeepingService, KeptRows
from kdmesh_trainer.stop import StepLost


class Outage:
    """What a teacher has failed this rank in, if anything: the step that is under way is lost, and ends the run."""

    def __init__(self) -> None:
        self._error: RpcError | None = None

    @property
    def has_begun(self) -> bool:
        """Whether the step is lost."""
        return self._error is not None

    def begin(self, error: RpcError) -> None:
        """The first that is told is why."""
        self._error = self._error or error.with_traceback(None)  # which holds what was waited for

    def leave(self, mesh: Mesh) -> None:
        """Raises StepLost, on every rank, where it has begun on any. Collective."""
        for error in mesh.gather(self._error):
            if error is not None:
                raise StepLost(str(error)) from error


@dataclass(frozen=True, slots=True)
class _Blank:
    """What stands for rows in a step that is lost: as wide as those before, and of the same weights."""

    columns: int
    dtype: torch.dtype
    weight_version: int

    @classmethod
    def like(cls, rows: TeacherRows) -> _Blank:
        return cls(rows.rows_RD.shape[1], rows.rows_RD.dtype, rows.weight_version)

    def rows(self, count: int) -> TeacherRows:
        rows_RD = torch.zeros(count, self.columns, dtype=self.dtype)
        return CopiedRows(rows_RD=rows_RD, weight_version=self.weight_version)


class LenientRows:
    """A KeepingService whose rows always come: once one has failed, blank ones, and the outage is known.

    Other ranks compute with this one and would wait for it, so it may only leave where they do. Before any rows have
    come there is nothing to lose, and it raises.
    """

    def __init__(self, teacher: KeepingService, outage: Outage) -> None:
        self._teacher = teacher
        self._outage = outage
        self._blank: _Blank | None = None

    def submit(self, sequences: Sequence[TokenSequence], *, keep: bool = False) -> KeptRows:
        """See KeepingService."""
        if self._blank is not None and self._outage.has_begun:
            return _LenientRows(self, None, sequences)
        return _LenientRows(self, self._teacher.submit(sequences, keep=keep), sequences)

    def take(self, pending: KeptRows | None, count: int) -> TeacherRows:
        """So many rows, those of `pending` if they come."""
        if pending is not None and not (self._blank is not None and self._outage.has_begun):
            try:
                rows = pending.wait()
            except RpcError as error:
                if self._blank is None:
                    raise
                self._outage.begin(error)
            else:
                self._blank = _Blank.like(rows)
                return rows
        assert self._blank is not None
        return self._blank.rows(count)


class _LenientRows:
    """KeptRows of a LenientRows."""

    def __init__(self, owner: LenientRows, pending: KeptRows | None, sequences: Sequence[TokenSequence]) -> None:
        self._owner = owner
        self._pending = pending
        self._num_rows = sum(sequence.num_rows for sequence in sequences)

    @property
    def is_done(self) -> bool:
        """See AskedRows."""
        return self._pending is None or self._pending.is_done

    @property
    def has_failed(self) -> bool:
        """See KeptRows."""
        return self._pending is not None and self._pending.has_failed

    def wait(self) -> TeacherRows:
        """See KeptRows."""
        pending, self._pending = self._pending, None
        return self._owner.take(pending, self._num_rows)
