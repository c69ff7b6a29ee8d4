"""What the student is trained to minimise where its head is spread over ranks by tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdmesh.errors import ModelMismatch
from kdmesh.losses import (
    CROSS_ENTROPY,
    FusedLoss,
    OwnRows,
    VocabularyShare,
    fused_linear_across_ranks,
)
from kdmesh.models.packing import moved
from kdmesh_trainer.algorithms.seam import StudentRows
from kdmesh_trainer.objectives.head import TeacherHead, final_states
from kdmesh_trainer.objectives.objective import CrossEntropy, Distillation, Objective
from kdmesh_trainer.sources.batches import PanelRows, TeacherRows

# By number, which ranks tell each other: one without rows must bring none of the type that the others have.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def spread(objective: Objective, share: VocabularyShare) -> Objective:
    """The same with a head of which every rank has the tokens of `share`: the head of its rows is these.

    Its calls are collective, also on ranks without rows.

    Args:
        objective: CrossEntropy, or Distillation by `vanilla_kd` from one TeacherHead, which from now on holds only
            these tokens.
    """
    if isinstance(objective, CrossEntropy):
        return SpreadCrossEntropy(share=share)
    assert isinstance(objective, Distillation) and isinstance(objective.teacher_head, TeacherHead)
    objective.teacher_head.keep_only(share)
    return SpreadDistillation(whole=objective, head=objective.teacher_head, share=share)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadCrossEntropy:
    """Cross-entropy on the data's own tokens."""

    share: VocabularyShare

    def at(self, step: int) -> SpreadCrossEntropy:
        """See Objective."""
        return self

    def __call__(self, rows: StudentRows, teacher: TeacherRows | PanelRows | None) -> FusedLoss:
        """The teacher's rows, if any, are not looked at."""
        everyone = self.share.numbers(len(rows.labels_R), rows.weight_R is not None)
        counts = [count for count, _ in everyone]
        own = OwnRows(
            student_hidden_RD=rows.hidden_RD,
            teacher_hidden_RE=None,
            labels_R=rows.labels_R,
            token_weight_R=_weights(rows, any(has_weights for _, has_weights in everyone)),
        )
        return fused_linear_across_ranks(own, rows.head, None, CROSS_ENTROPY, self.share, counts=counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadDistillation:
    """The student's distribution against the teacher's, row by row."""

    whole: Distillation  # what is meant
    head: TeacherHead
    share: VocabularyShare

    def at(self, step: int) -> SpreadDistillation:
        """See Objective."""
        return replace(self, whole=self.whole.at(step))

    def __call__(self, rows: StudentRows, teacher: TeacherRows | PanelRows | None) -> FusedLoss:
        """See Objective.

        Raises:
            ModelMismatch: ranks have rows of different weight versions, or the teacher has another by now.
        """
        assert not isinstance(teacher, PanelRows)
        counts, version, dtype, have_weights = self._agree(rows, teacher)
        if version is None:  # no rank has a row
            return SpreadCrossEntropy(share=self.share)(rows, None)
        head = self.head.at(version)
        hidden_RE = (
            torch.empty(0, head.hidden_size, dtype=dtype, device=rows.hidden_RD.device)
            if teacher is None
            else moved(final_states(teacher, head.hidden_size), rows.hidden_RD.device).to(dtype)
        )
        terms = self.whole.terms
        own = OwnRows(
            student_hidden_RD=rows.hidden_RD,
            teacher_hidden_RE=hidden_RE,
            labels_R=rows.labels_R if terms.needs_labels else None,
            ce_weight_R=_imitated(rows, terms.ce_weight) if terms.ce_weight > 0 else None,
            token_weight_R=_weights(rows, have_weights),
        )
        return fused_linear_across_ranks(own, rows.head, head, terms, self.share, counts=counts)

    def _agree(self, rows: StudentRows, teacher: TeacherRows | None) -> tuple[list[int], int | None, torch.dtype, bool]:
        """Rows of each rank, their weight version and their type; whether some rows have weights. Collective."""
        own = (0, 0, 0)
        if teacher is not None:
            own = (len(teacher.rows_RD), teacher.weight_version, _DTYPES.index(teacher.rows_RD.dtype))
        everyone = self.share.numbers(*own, rows.weight_R is not None)
        known = {(version, dtype) for count, version, dtype, _ in everyone if count > 0}
        if len({version for version, _ in known}) > 1:
            versions = sorted({version for version, _ in known})
            raise ModelMismatch(
                f"the teacher's rows of one step have weight versions {versions} on different ranks; a step never "
                "mixes versions"
            )
        counts = [count for count, *_ in everyone]
        have_weights = any(has_weights for *_, has_weights in everyone)
        if not known:
            return counts, None, _DTYPES[0], have_weights
        version, dtype = max(known)  # the widest type
        return counts, version, _DTYPES[dtype], have_weights


def _weights(rows: StudentRows, have_weights: bool) -> Tensor | None:
    """[R] that of each row, on every rank where one has any."""
    if not have_weights:
        return None
    return torch.ones(len(rows.labels_R), device=rows.labels_R.device) if rows.weight_R is None else rows.weight_R


def _imitated(rows: StudentRows, ce_weight: float) -> Tensor:
    """[R] the weight of cross-entropy, 0 on the rows that the student drew itself."""
    weight_R = torch.full(rows.labels_R.shape, ce_weight, dtype=torch.float32, device=rows.labels_R.device)
    weight_R[: rows.num_sampled] = 0
    return weight_R
