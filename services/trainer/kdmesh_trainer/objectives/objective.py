"""What the student is trained to minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from kdmesh.errors import InvalidRequest
from kdmesh.losses import FusedLoss, fused_linear_cross_entropy
from kdmesh_trainer.algorithms.seam import Algorithm, LossRows, StudentRows, Terms
from kdmesh_trainer.algorithms.vanilla_kd import vanilla_kd
from kdmesh_trainer.objectives.head import Heads
from kdmesh_trainer.sources.batches import PanelRows, TeacherRows


class Objective(Protocol):
    """The loss of one micro-batch's rows."""

    def at(self, step: int) -> Objective:
        """What is minimised in optimizer step `step`, counted from 0."""
        ...

    def __call__(self, rows: StudentRows, teacher: TeacherRows | PanelRows | None) -> FusedLoss:
        """Summed over rows, never averaged.

        Args:
            rows: of the student; there may be none.
            teacher: rows of the same positions; None where the source asks no teacher, or R is 0.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """What an algorithm makes of the student's rows and the teacher's."""

    terms: Terms
    teacher_head: Heads
    algorithm: Algorithm = vanilla_kd
    numbers_at: Callable[[int], Mapping[str, float]] | None = None  # temperature and weights by step; None: constant

    def at(self, step: int) -> Distillation:
        """See Objective."""
        if self.numbers_at is None:
            return self
        now = self.numbers_at(step)
        terms = replace(
            self.terms, temperature=now["temperature"], kd_weight=now["kd_weight"], ce_weight=now["ce_weight"]
        )
        return replace(self, terms=terms)

    def __call__(self, rows: StudentRows, teacher: TeacherRows | PanelRows | None) -> FusedLoss:
        """What the algorithm says; without teacher rows there is nothing to learn from, so R must be 0.

        Raises:
            InvalidRequest: an algorithm of the user's own returns something else than a loss of these rows.
        """
        if teacher is None:
            assert len(rows.labels_R) == 0
            return self._with_all_parameters(fused_linear_cross_entropy(rows.hidden_RD, rows.head, rows.labels_R))
        answered = LossRows(
            hidden_RD=rows.hidden_RD,
            head=rows.head,
            labels_R=rows.labels_R,
            num_sampled=rows.num_sampled,
            sequences=rows.sequences,
            weight_R=rows.weight_R,
            teacher=teacher,
            heads=self.teacher_head,
        )
        loss = self.algorithm(answered, self.terms)
        _refuse_other_than_loss(loss, num_rows=len(rows.labels_R))
        return self._with_all_parameters(loss)

    def _with_all_parameters(self, loss: FusedLoss) -> FusedLoss:
        """The same loss, of which every parameter of the algorithm has a gradient: zeros where it had no part.

        Ranks reduce gradients together, so none may lack one that another has.
        """
        if not isinstance(self.algorithm, nn.Module):
            return loss
        nothing = sum(parameter.flatten()[:0].sum() for parameter in self.algorithm.parameters())
        return replace(loss, loss_sum=loss.loss_sum + nothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy on the data's own tokens."""

    def at(self, step: int) -> CrossEntropy:
        """See Objective."""
        return self

    def __call__(self, rows: StudentRows, teacher: TeacherRows | PanelRows | None) -> FusedLoss:
        """The teacher's rows, if any, are not looked at."""
        return fused_linear_cross_entropy(rows.hidden_RD, rows.head, rows.labels_R, token_weight_R=rows.weight_R)


def _refuse_other_than_loss(loss: object, *, num_rows: int) -> None:
    if not isinstance(loss, FusedLoss):
        raise InvalidRequest(f"the algorithm returned {type(loss).__name__}; it must return a kdmesh.losses.FusedLoss")
    lengths = len(loss.divergence_R), len(loss.cross_entropy_R)
    if loss.loss_sum.shape != () or max(lengths) != num_rows:
        raise InvalidRequest(
            f"the algorithm returned a loss_sum of shape {tuple(loss.loss_sum.shape)}, {lengths[0]} divergences and "
            f"{lengths[1]} cross-entropies of {num_rows} rows; it must be [], and one of them must have every row"
        )
