"""The output heads of several teachers."""

from __future__ import annotations

from collections.abc import Mapping

from kdmesh.losses import MixedTeacher
from kdmesh_trainer.objectives.head import Target, TeacherHead
from kdmesh_trainer.sources.batches import PanelPart, PanelRows, TeacherRows


class PanelHeads:
    """Holds each teacher's head once, from its first rows on, and says whom a row learns from."""

    def __init__(self, heads: Mapping[str, TeacherHead], *, weights: Mapping[str, float] | None) -> None:
        """
        Args:
            weights: of each teacher in the mixture that all rows learn; None: every row learns from its own.
        """
        self._heads = heads
        total = sum(weights.values()) if weights else 1.0
        self._shares = None if weights is None else {name: weight / total for name, weight in weights.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the teachers."""
        return tuple(self._heads)

    def targets(self, rows: TeacherRows | PanelRows) -> tuple[Target, ...]:
        """See Heads."""
        assert isinstance(rows, PanelRows)
        if self._shares is None:
            return tuple(Target(index_R=part.index_R, teachers=(self._teacher(part, 1.0),)) for part in rows.parts)
        mixed = tuple(self._teacher(part, self._shares[part.name]) for part in rows.parts)
        return (Target(index_R=None, teachers=mixed),)

    def whole_targets(self, rows: TeacherRows | PanelRows) -> tuple[Target, ...]:
        """See Heads: all of several teachers have the student's tokenizer."""
        return self.targets(rows)

    def _teacher(self, part: PanelPart, share: float) -> MixedTeacher:
        return self._heads[part.name].teacher(part.rows, share)
