"""Reads what a training run has recorded so far."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RECENT_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step."""

    step: int
    time: float  # Unix seconds, when it was done
    loss_nats_per_token: float
    cross_entropy_nats_per_token: float | None
    num_tokens: int
    step_s: float
    teacher_wait_s: float
    door: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledStep:
    """What a step that samples records beside the others' figures."""

    step: int
    divergence_nats_per_token: float
    response_tokens_mean: float
    cut_off_fraction: float
    staleness_steps_max: int
    sampler_kl_k3_nats: float
    student_entropy_nats: float
    teacher_entropy_nats: float
    sampling_wait_s: float
    teacher_wait_s: float
    phase_s: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The student after `step` steps, on held-out data."""

    step: int
    kl_nats_per_token: float | None
    perplexity: float
    top1_agreement: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The contents of a metrics.jsonl, in order."""

    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def done(self) -> int:
        """Steps done."""
        return self.steps[-1].step + 1 if self.steps else 0

    def recent(self) -> Sequence[Step]:
        """The last few steps."""
        return self.steps[-_RECENT_STEPS:]


def read_record(path: Path) -> Record:
    """What `path` holds now; nothing when it is not there. A line that is being written is left out."""
    rows = _rows(path)
    return Record(
        steps=tuple(_of(Step, row) for row in rows if row["kind"] == "step"),
        evaluations=tuple(_of(Evaluation, row) for row in rows if row["kind"] == "evaluation"),
    )


def read_sampled(path: Path) -> tuple[SampledStep, ...]:
    """The steps of a run that samples."""
    return tuple(_of(SampledStep, row) for row in _rows(path) if row["kind"] == "step")


def tokens_per_second(steps: Sequence[Step]) -> float:
    """Tokens trained on, over the time that their steps took."""
    seconds = sum(step.step_s for step in steps)
    return sum(step.num_tokens for step in steps) / seconds if seconds else 0.0


def teacher_wait_fraction(steps: Sequence[Step]) -> float:
    """Part of the steps' time that a rank spent waiting for rows."""
    seconds = sum(step.step_s for step in steps)
    return sum(step.teacher_wait_s for step in steps) / seconds if seconds else 0.0


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _of(kind: type[Any], row: dict[str, Any]) -> Any:
    return kind(**{name: row[name] for name in kind.__slots__})
