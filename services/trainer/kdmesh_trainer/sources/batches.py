"""What a source hands to the loop: one optimizer step's share of this rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kdmesh.models.packing import moved
from kdmesh.types import TokenSequence
from kdmesh_trainer.stats import RolloutFigures


class TeacherRows(Protocol):
    """A teacher's hidden states at the positions that were asked for."""

    @property
    def rows_RD(self) -> Tensor:
        """[R, D] in the order of the sequences and of each one's positions; read-only. Where outputs of n layers are
        asked for they follow, [R, (1 + n) D].

        On the CPU, or on this rank's device where ranks hold a row of tokens together, or a head.
        """
        ...

    @property
    def weight_version(self) -> int:
        """The teacher weights that made them; only the head of the same version turns them into logits."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CopiedRows:
    """TeacherRows in memory of this rank's own."""

    rows_RD: Tensor
    weight_version: int


def copied(rows: TeacherRows, device: torch.device) -> CopiedRows:
    """The same on `device`, for a rank that waits for others with them, who may need the teacher's memory."""
    own_RD = rows.rows_RD.clone() if device.type == "cpu" else moved(rows.rows_RD, device)
    return CopiedRows(rows_RD=own_RD, weight_version=rows.weight_version)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PanelPart:
    """What one of several teachers answered."""

    name: str
    rows: TeacherRows
    index_R: Tensor | None  # [R'] int64 on the CPU, ascending: which of the micro-batch's rows these are; None: all
    num_tokens: int  # of the sequences that it was asked for
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelRows:
    """What several teachers answered for one micro-batch."""

    parts: tuple[PanelPart, ...]  # at least one, of each teacher at most one


class PendingRows(Protocol):
    """Rows that were asked for, or will be when they are waited on."""

    def wait(self) -> TeacherRows | PanelRows:
        """Block until the rows are here. Called once.

        The caller becomes their only owner: the teacher's memory is free again as soon as
        the caller drops them, so neither this object nor its source may keep a reference.

        Raises:
            RpcError: they will not come; the step cannot be finished.
        """
        ...


class AskedRows(PendingRows, Protocol):
    """Rows that were asked for."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """What this rank puts through one forward and backward pass, alone or with those who hold the row with it."""

    sequences: tuple[TokenSequence, ...]  # of the whole row; empty: this rank only takes part in the collectives
    teacher: PendingRows | None  # None: no teacher is asked, or there is no row for this rank to wait for
    # float32, of the labels of the first rows as they were sampled, the other rows being data; None: all are data
    rollout_logprobs_S: Tensor | None = None
    # Where others hold the row with this rank:
    asked: tuple[TokenSequence, ...] | None = None  # the sequences that it asks a teacher for; None: all
    held: tuple[TokenSequence, ...] | None = None  # those that its rows are of, with these rows alone; None: all

    @property
    def num_sampled_rows(self) -> int:
        """S: the rows whose labels the student drew."""
        return 0 if self.rollout_logprobs_S is None else len(self.rollout_logprobs_S)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBatch:
    """One optimizer step's share of this rank; every rank has the same number of micro-batches."""

    step: int
    micro_batches: tuple[MicroBatch, ...]  # at least one
    num_loss_tokens: int  # over all ranks
    num_tokens: int  # over all ranks
    loss_weight: float  # of all loss tokens, over all ranks: their number where all weigh 1; 0: there are none
    teacher_age_steps: int | None = None  # steps since the teacher got the student's weights; None: it is frozen
    rollouts: RolloutFigures | None = None  # None: nothing was sampled
    # Sequences of each dataset of a blend over all ranks, by name; empty: it is none.
    datasets: Mapping[str, int] = field(default_factory=dict)


class Source(Protocol):
    """Where the loop gets its batches from."""

    def start_at(self, step: int) -> None:
        """Make `step` the first one that next_batch gives. Called once, before it."""
        ...

    def next_batch(self) -> StepBatch:
        """The next step's share of this rank. Collective where something is sampled.

        A pure function of data, seed and step, and of the student's weights where something is sampled.
        """
        ...
