"""What the demo found, as figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdmesh.demo.record import Evaluation, Record, teacher_wait_fraction, tokens_per_second
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
