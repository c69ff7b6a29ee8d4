"""What an algorithm is, and what it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdmesh.alignment.boundaries import BoundaryTokens
from kdmesh.alignment.vocabularies import SharedTokens
from kdmesh.losses import FusedLoss, Mix, MixedTeacher, OutputHead, SampledDivergence, fused_linear_divergence
from kdmesh.types import TokenSequence
from kdmesh_trainer.objectives.head import Heads, Target
from kdmesh_trainer.sources.batches import PanelRows, TeacherRows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StudentRows:
    """The loss tokens of one micro-batch on this rank, as the student sees them."""

    hidden_RD: Tensor  # the student's, after its final norm; carries a gradient
    head: OutputHead  # the student's as it is in this step, over its real tokens; carries a gradient
    labels_R: Tensor  # int64 next tokens
    num_sampled: int = 0  # the first rows, whose labels the student drew, so that they are not imitated
    # that the rows are of, in order, with the positions of these rows; what the teacher reads of them included
    sequences: tuple[TokenSequence, ...] = ()
    weight_R: Tensor | None = None  # float32, of each row's loss; None: 1
    layers: tuple[Tensor, ...] = ()  # [R, D] what layers that are compared give, in order; each carries a gradient


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossRows(StudentRows):
    """The same, at least one, with what the teacher answered.

    Valid within one call only: the teacher's memory is its own again when nobody holds what `targets` gave.
    """

    teacher: TeacherRows | PanelRows
    heads: Heads

    def targets(self) -> tuple[Target, ...]:
        """What the rows are to learn, over tokens that student and teacher share.

        Raises:
            ModelMismatch: the teacher has another version by now.
        """
        return self.heads.targets(self.teacher)

    def whole_targets(self) -> tuple[Target, ...]:
        """The same over all tokens of the teacher, where it has another tokenizer.

        Of InChunks it is all rows that the teacher answered, and which those are for the student is in the sequences.
        """
        return self.heads.whole_targets(self.teacher)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms(Mix):
    """What `objective` says about the loss of a row in this step."""

    imitates_data: bool = False  # in some step of the run cross-entropy has a weight

    @property
    def needs_labels(self) -> bool:
        """At another temperature cross-entropy costs a second sum: only in runs that learn from it."""
        is_imitated = self.imitates_data or self.ce_weight > 0
        return is_imitated or self.temperature == 1 or isinstance(self.divergence, SampledDivergence)

    def compare(
        self,
        hidden_RD: Tensor,
        head: OutputHead,
        teachers: Sequence[MixedTeacher],
        labels_R: Tensor | None,
        *,
        ce_weight: float = 0.0,
        token_weight_R: Tensor | None = None,
    ) -> FusedLoss:
        """Sum over rows of weight * (kd_weight * divergence + ce_weight * cross-entropy), in bounded memory.

        Args:
            teachers: whose mixture is learnt, over the tokens of `head`.
            labels_R: for cross-entropy, which is reported where it takes no time; None: none.
            token_weight_R: of each row; 1 when None.
        """
        first, *others = teachers
        return fused_linear_divergence(
            hidden_RD,
            head,
            first.hidden_RE,
            first.head,
            divergence=self.divergence,
            mixed_with=others,
            temperature=self.temperature,
            labels_R=labels_R if self.needs_labels else None,
            kd_weight=self.kd_weight,
            ce_weight=ce_weight,
            token_weight_R=token_weight_R,
            with_entropies=self.with_entropies,
            top_k=self.top_k,
        )


class Algorithm(Protocol):
    """The loss of one micro-batch's rows.

    One that is a torch.nn.Module has its parameters trained with the student: sharded, reduced over ranks, updated
    and written to checkpoints. It is the same on every rank when it is built.
    """

    def __call__(self, rows: LossRows, terms: Terms) -> FusedLoss:
        """Summed over rows, never averaged: the trainer divides by the loss tokens of all ranks.

        Ranks have different numbers of rows, and some have none and do not call it: so no collectives.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setup:
    """What an algorithm is built for."""

    student_head: OutputHead  # whole, float32, on the CPU, over its real tokens, as it is before the first step
    teacher_heads: Callable[[], Mapping[str, OutputHead]]  # whole, on the CPU, by name; that of the only one is empty
    shared: SharedTokens | None  # of the two tokenizers; None: they have the same
    device: torch.device  # where rows will be
    boundaries: BoundaryTokens | None = None  # of the two tokenizers, where the objective asks for them
