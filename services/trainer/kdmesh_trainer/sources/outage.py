"""What a teacher does not give: the rank goes on with blanks, so that all ranks leave the step together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kdmesh.errors import ModelMismatch, RpcError
from kdmesh.losses import OutputHead
from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.head import HeadService
from kdmesh_trainer.sources.batches import TeacherRows
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


class LenientService(KeepingService, Protocol):
    """A KeepingService that can do without the teacher."""

    def blank_rows(self, num_rows: int) -> TeacherRows:
        """Zeros, as wide and of the same weights as rows that were asked for now."""
        ...


class LenientRows:
    """A KeepingService whose rows always come: once one has failed, blank ones, and the outage is known.

    Other ranks compute with this one and would wait for it, so it may only leave where they do.
    """

    def __init__(self, teacher: LenientService, outage: Outage) -> None:
        self._teacher = teacher
        self._outage = outage

    def submit(self, sequences: Sequence[TokenSequence], *, keep: bool = False) -> KeptRows:
        """See KeepingService."""
        pending = None if self._outage.has_begun else self._teacher.submit(sequences, keep=keep)
        return _LenientRows(self, pending, sequences)

    def take(self, pending: KeptRows | None, count: int) -> TeacherRows:
        """So many rows, those of `pending` if they come."""
        if pending is not None and not self._outage.has_begun:
            try:
                return pending.wait()
            except RpcError as error:
                self._outage.begin(error)
        return self._teacher.blank_rows(count)


class LenientHeads(HeadService, Protocol):
    """A HeadService that can do without the teacher."""

    @property
    def weight_version(self) -> int:
        """Of the weights that rows are asked of now."""
        ...

    def blank_head(self) -> tuple[OutputHead, int]:
        """Zeros in the shape of the head that goes with rows that are asked for now, and its weight version."""
        ...


class LenientHead:
    """A HeadService whose head always comes, as LenientRows do: what they go with, or zeros."""

    def __init__(self, teacher: LenientHeads, outage: Outage) -> None:
        self._teacher = teacher
        self._outage = outage

    def head(self) -> tuple[OutputHead, int]:
        """See HeadService."""
        if not self._outage.has_begun:
            try:
                return self._fitting()
            except RpcError as error:
                self._outage.begin(error)
        return self._teacher.blank_head()

    def _fitting(self) -> tuple[OutputHead, int]:
        """Raises ModelMismatch where the teacher, started anew, has no head for rows that it gave before."""
        head, version = self._teacher.head()
        if version != self._teacher.weight_version:
            raise ModelMismatch(
                f"the teacher's head has weight version {version} by now; the rows have {self._teacher.weight_version}"
            )
        return head, version


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
