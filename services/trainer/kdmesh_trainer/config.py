"""Everything the trainer can be told."""

from __future__ import annotations

from pydantic import model_validator

from kdmesh.config import BrokenRules
from kdmesh_trainer.rules import export, length, objective, parallel, source, student, teachers
from kdmesh_trainer.sections.job_config import JobSections
from kdmesh_trainer.sections.other_names import OTHER_NAMES

_RULES = (
    length.broken,
    teachers.broken,
    student.broken,
    objective.broken,
    source.broken,
    parallel.broken,
    export.broken,
)


class TrainerConfig(JobSections):
    """One training job, whose sections go together."""

    other_names = OTHER_NAMES

    @model_validator(mode="after")
    def _sections_go_together(self) -> TrainerConfig:
        if broken := [what for rules in _RULES for what in rules(self)]:
            raise BrokenRules(broken)
        return self
