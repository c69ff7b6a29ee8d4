"""The figures of one step or one evaluation, over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one optimizer step measured, before its update; equal on every rank."""

    loss_nats_per_token: float  # what was minimised
    divergence_nats_per_token: float | None  # None: the objective has no teacher
    cross_entropy_nats_per_token: float | None  # None: the objective does not compute it
    top1_agreement: float | None  # fraction of loss tokens where student and teacher prefer the same token
    gradient_norm: float  # before clipping
    learning_rate: float
    num_loss_tokens: int
    num_tokens: int  # loss tokens and all others
    teacher_wait_s: float  # mean over ranks of the time spent waiting for rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How the student does on held-out data; per-token averages over all of it, equal on every rank."""

    kl_nats_per_token: float | None  # KL(teacher || student) at temperature 1; None without a teacher
    cross_entropy_nats_per_token: float
    top1_agreement: float | None  # None without a teacher
    num_loss_tokens: int
    num_sequences: int

    @property
    def perplexity(self) -> float:
        """exp of the cross-entropy; infinite where that overflows."""
        try:
            return math.exp(self.cross_entropy_nats_per_token)
        except OverflowError:
            return math.inf
