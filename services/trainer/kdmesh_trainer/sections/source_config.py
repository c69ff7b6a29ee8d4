"""Whose answers a trainer trains on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kdmesh.config import StrictModel
from kdmesh_trainer.sections.environment_config import EnvironmentConfig
from kdmesh_trainer.sections.judge_config import JudgeConfig
from kdmesh_trainer.sections.rollouts_config import RolloutsConfig, SamplingConfig


class OffPolicy(StrictModel):
    """The data's own answers are trained on."""

    kind: Literal["off_policy"] = "off_policy"


class OnPolicy(StrictModel):
    """The student's own answers to the data's prompts are trained on; batch.sequences counts samples."""

    kind: Literal["on_policy"]

    rollouts: RolloutsConfig = RolloutsConfig()
    """Who samples."""

    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt; divides batch.sequences."""

    sampled_fraction: float = Field(1.0, gt=0, le=1)
    """Share of batch.sequences that is sampled, to the nearest whole prompt; the rest are the data's own answers."""

    sampling: SamplingConfig = SamplingConfig()
    """How they are drawn."""

    environment: EnvironmentConfig | None = None
    """What answers the student, so that samples have several turns (docs/on_policy.md); null: nobody does."""

    judge: JudgeConfig | None = None
    """How much each sample counts (docs/on_policy.md); null: all count alike."""

    max_staleness: int = Field(0, ge=0, le=1000)
    """Updates of the student that a sample's weights may be behind those it trains; 0 samples and trains in turn."""

    update_policy: Literal["finish", "abort", "continue"] = "finish"
    """What becomes of samples that are being drawn when new weights come: finished on the old ones first, drawn again,
    or continued with the new ones."""

    colocated: bool = False
    """Student, rollout servers and teachers share their devices, so who has no turn gives the memory back and sleeps;
    needs max_staleness 0. The servers then serve this job alone."""

    early_rows_mib: int = Field(1024, ge=0)
    """Memory of each rank for rows that the teacher computes while other samples of the step are still drawn; 0 asks
    for them when all are here."""

    too_long: Literal["drop", "fail"] = "drop"
    """What happens to a prompt that leaves no room for max_new_tokens in data.max_tokens; dropped ones are counted."""

    overlap_tokens: int = Field(8, ge=0, le=128)
    """How many of the likeliest tokens of student and teacher are compared in every row; 0 compares none."""

    show_every: int | None = Field(None, ge=1)
    """Steps between looks at a prompt with its responses, in the log and in samples.jsonl; null shows none."""

    def prompts_of(self, sequences: int) -> int:
        """How many prompts of a step with that many sequences are sampled from."""
        return int(self.sampled_fraction * sequences / self.samples_per_prompt + 0.5)

    @model_validator(mode="after")
    def _takes_turns(self) -> OnPolicy:
        if self.colocated and self.max_staleness > 0:
            raise ValueError(f"colocated needs max_staleness 0, not {self.max_staleness}: they work in turn")
        return self
