"""The teacher's output head, of the version that a step's rows have, and what those rows make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kdmesh.alignment.vocabularies import SharedTokens
from kdmesh.errors import ModelMismatch
from kdmesh.losses import MixedTeacher, OutputHead, VocabularyShare
from kdmesh.models.packing import moved
from kdmesh_trainer.sources.batches import PanelRows, TeacherRows


class HeadService(Protocol):
    """Where a teacher's head comes from."""

    def head(self) -> tuple[OutputHead, int]:
        """The current head on the CPU, padding rows included, and its weight version. Blocks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """Some rows of a micro-batch, and the teachers whose mixture they learn."""

    index_R: Tensor | None  # [R'] int64 on the CPU, ascending; None: all rows
    teachers: tuple[MixedTeacher, ...]  # at least one; their weights sum to 1; rows on the device of the heads
    tokens_S: Tensor | None = None  # [S] int64 the student's tokens that the heads are over; None: all


class Heads(Protocol):
    """The head of the only teacher, or those of several."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the teachers; that of the only one is empty."""
        ...

    def targets(self, rows: TeacherRows | PanelRows) -> tuple[Target, ...]:
        """What the rows of one micro-batch are to learn; a row is in one target, or has none and is in no other's.

        Raises:
            ModelMismatch: a service has another version by now, so these rows cannot be used.
        """
        ...

    def whole_targets(self, rows: TeacherRows | PanelRows) -> tuple[Target, ...]:
        """The same over all tokens of a teacher, also of one that has another tokenizer."""
        ...


class TeacherHead:
    """Holds one version of the head on this rank's device, and fetches another only when rows need it."""

    def __init__(
        self,
        service: HeadService,
        *,
        vocabulary_size: int,
        device: torch.device,
        shared: SharedTokens | None = None,
    ) -> None:
        """
        Args:
            vocabulary_size: real tokens of the head to use.
            shared: those among them that the student's other tokenizer has too; None: it has the same tokenizer.
        """
        self._student_S = None if shared is None else torch.from_numpy(shared.student_ids.astype(np.int64)).to(device)
        self._teacher_S = None if shared is None else torch.from_numpy(shared.teacher_ids.astype(np.int64))
        self._service = service
        self._vocabulary_size = vocabulary_size
        self._device = device
        self._share: VocabularyShare | None = None
        self._version: int | None = None
        self._held: dict[bool, OutputHead] = {}  # over all tokens, and over the shared ones

    def keep_only(self, share: VocabularyShare) -> None:
        """From now on it is the head of these tokens, of the real ones; and no other is held."""
        assert share.vocabulary_size == self._vocabulary_size and self._student_S is None
        self._share, self._held = share, {}

    @property
    def names(self) -> tuple[str, ...]:
        """See Heads."""
        return ("",)

    def targets(self, rows: TeacherRows | PanelRows) -> tuple[Target, ...]:
        """See Heads."""
        if self._student_S is not None:
            assert isinstance(rows, PanelRows)
            (part,) = rows.parts
            teachers = (self.teacher(part.rows, 1.0),)
            return (Target(index_R=part.index_R, teachers=teachers, tokens_S=self._student_S),)
        assert not isinstance(rows, PanelRows)
        return (Target(index_R=None, teachers=(self.teacher(rows, 1.0),)),)

    def whole_targets(self, rows: TeacherRows | PanelRows) -> tuple[Target, ...]:
        """See Heads."""
        if self._student_S is None:
            return self.targets(rows)
        if not isinstance(rows, PanelRows):
            return (Target(index_R=None, teachers=(self.teacher(rows, 1.0, is_whole=True),)),)
        (part,) = rows.parts
        return (Target(index_R=part.index_R, teachers=(self.teacher(part.rows, 1.0, is_whole=True),)),)

    def teacher(self, rows: TeacherRows, weight: float, *, is_whole: bool = False) -> MixedTeacher:
        """The rows with their head, on this rank's device, as a part of a mixture."""
        head = self.at(rows.weight_version, is_whole=is_whole)
        hidden_RE = final_states(rows, head.hidden_size)
        return MixedTeacher(hidden_RE=moved(hidden_RE, self._device), head=head, weight=weight)

    def at(self, weight_version: int, *, is_whole: bool = False) -> OutputHead:
        """The head that turns rows of `weight_version` into logits over the shared tokens. Borrowed.

        Args:
            is_whole: over all real tokens of the teacher instead.

        Raises:
            ModelMismatch: the service has another version by now, so these rows cannot be used.
        """
        is_whole = is_whole or self._teacher_S is None
        if self._version != weight_version or is_whole not in self._held:
            # Let go of the old one before the new one takes as much memory.
            self._held = {} if self._version != weight_version else self._held
            head, self._version = self._service.head()
            head = head.sliced(self._vocabulary_size)
            if not is_whole:
                assert self._teacher_S is not None
                head = head.selected(self._teacher_S)
            if self._share is not None:
                head = head.part(self._share.first, self._share.num_tokens)
            self._held[is_whole] = _on_device(head, self._device, copies=self._share is not None)
        if self._version != weight_version:
            raise ModelMismatch(
                f"rows have weight version {weight_version}, but the teacher's head has {self._version}; "
                "rows and head of one step must have the same"
            )
        return self._held[is_whole]


def final_states(rows: TeacherRows, width: int) -> Tensor:
    """[R, width] the final hidden states of rows in which outputs of layers may follow them."""
    return rows.rows_RD if rows.rows_RD.shape[1] == width else rows.rows_RD[:, :width].contiguous()


def _on_device(head: OutputHead, device: torch.device, *, copies: bool) -> OutputHead:
    """A part is copied also where it lies on the device, so that the rest of it can go."""
    return OutputHead(
        weight_VD=head.weight_VD.to(device, copy=copies),
        bias_V=None if head.bias_V is None else head.bias_V.to(device, copy=copies),
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
    )
