"""What the demo found, as figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdmesh.demo.record import Evaluation, Record, SampledStep, teacher_wait_fraction, tokens_per_second
from kdmesh.errors import KdmeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The records of all runs, and how long things took."""

    teacher: Record
    sft: Record
    kd: Record
    seconds: Mapping[str, float]  # by phase, in order
    is_teacher_cached: bool
    report: Path

    @property
    def rows(self) -> list[tuple[str, Evaluation]]:
        """The three students on held-out data, by name."""
        return [
            ("untouched", self.sft.evaluations[0]),
            ("SFT", self.sft.evaluations[-1]),
            ("KD", self.kd.evaluations[-1]),
        ]

    def json(self) -> str:
        """The figures for a machine, on one line."""
        (_, initial), (_, sft), (_, kd) = self.rows
        return json.dumps(
            {
                "kl_initial": initial.kl_nats_per_token,
                "kl_sft": sft.kl_nats_per_token,
                "kl_kd": kd.kl_nats_per_token,
                "perplexity_teacher": self.teacher.evaluations[-1].perplexity,
                "perplexity_initial": initial.perplexity,
                "perplexity_sft": sft.perplexity,
                "perplexity_kd": kd.perplexity,
                "tokens_per_second": round(tokens_per_second(self.kd.steps), 1),
                "teacher_wait_fraction": round(teacher_wait_fraction(self.kd.steps), 4),
                "handle_door": self.kd.steps[-1].door,
                "steps": self.kd.done,
                "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
                "is_teacher_cached": self.is_teacher_cached,
                "report": str(self.report),
            }
        )

    def sentence(self) -> str:
        """The result in words."""
        _, sft, kd = (evaluation.kl_nats_per_token for _, evaluation in self.rows)
        assert sft is not None
        assert kd is not None
        if kd < sft:
            return f"The distilled student is {sft / kd:.1f} times nearer to its teacher than the fine-tuned one."
        return "Distillation did not bring the student nearer to its teacher than fine-tuning."


def check_same_start(sft: Record, kd: Record) -> None:
    """Raises KdmeshError unless both runs began with the same student, judged by the same teacher and data."""
    first, other = sft.evaluations[0], kd.evaluations[0]
    if first.step != 0 or first != other:
        raise KdmeshError(f"the two students did not start alike: {first} and {other}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPolicyOutcome:
    """The record of the run, and how long things took."""

    teacher: Record
    run: Record
    sampled: tuple[SampledStep, ...]
    seconds: Mapping[str, float]  # by phase, in order
    is_teacher_cached: bool
    report: Path

    @property
    def before(self) -> Evaluation:
        """The student that had only seen docstrings."""
        return self.run.evaluations[0]

    @property
    def after(self) -> Evaluation:
        """The student that had learnt from its own answers."""
        return self.run.evaluations[-1]

    def json(self) -> str:
        """The figures for a machine, on one line."""
        first, last = self.sampled[0], self.sampled[-1]
        return json.dumps(
            {
                "kl_before": self.before.kl_nats_per_token,
                "kl_after": self.after.kl_nats_per_token,
                "own_answers_kl_before": first.divergence_nats_per_token,
                "own_answers_kl_after": last.divergence_nats_per_token,
                "perplexity_teacher": self.teacher.evaluations[-1].perplexity,
                "perplexity_before": self.before.perplexity,
                "perplexity_after": self.after.perplexity,
                "response_tokens_mean": last.response_tokens_mean,
                "cut_off_fraction": last.cut_off_fraction,
                "staleness_steps_max": max(step.staleness_steps_max for step in self.sampled),
                "tokens_per_second": round(tokens_per_second(self.run.steps), 1),
                "sampling_wait_fraction": round(self.sampling_wait_fraction, 4),
                "teacher_wait_fraction": round(teacher_wait_fraction(self.run.steps), 4),
                "handle_door": self.run.steps[-1].door,
                "steps": self.run.done,
                "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
                "is_teacher_cached": self.is_teacher_cached,
                "report": str(self.report),
            }
        )

    @property
    def sampling_wait_fraction(self) -> float:
        """Part of the steps' time that was spent waiting for samples."""
        seconds = sum(step.step_s for step in self.run.steps)
        return sum(step.sampling_wait_s for step in self.sampled) / seconds if seconds else 0.0

    def sentence(self) -> str:
        """The result in words."""
        before, after = self.before.kl_nats_per_token, self.after.kl_nats_per_token
        assert before is not None
        assert after is not None
        if after < before:
            return f"Its own answers brought the student {before / after:.1f} times nearer to its teacher."
        return "Its own answers did not bring the student nearer to its teacher."
