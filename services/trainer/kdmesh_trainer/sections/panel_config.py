"""Refuses a configuration of several teachers that does not say who teaches what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import StringConstraints

from kdmesh_trainer.sections.objective_config import Distill

if TYPE_CHECKING:
    from kdmesh_trainer.config import TrainerConfig

TEACHER_NAME = "[A-Za-z0-9_-]+"
"""What a teacher's name may be, as a regular expression."""

TeacherName = Annotated[str, StringConstraints(pattern=f"^{TEACHER_NAME}$")]
"""Of a teacher among several; also in the data and in the names of figures."""


def refuse_unfit_teachers(cfg: TrainerConfig) -> None:
    """Raises ValueError unless it is clear which teacher, or which mixture of them, each row learns from."""
    weights = cfg.objective.teacher_weights if isinstance(cfg.objective, Distill) else None
    column = cfg.data.teacher_column
    if not cfg.teachers:
        if column is not None or weights is not None:
            key = "data.teacher_column" if weights is None else "objective.teacher_weights"
            raise ValueError(f"{key} needs `teachers`: a mapping of names to what `teacher` takes")
        return
    if cfg.teacher is not None:
        raise ValueError("there are `teacher` and `teachers`; give one of them")
    if not isinstance(cfg.objective, Distill):
        raise ValueError("`teachers` needs objective distill; for sft a single `teacher` serves evaluation")
    if cfg.source.kind == "on_policy" and cfg.source.colocated:
        raise ValueError("source.colocated takes a single `teacher`, not `teachers`")
    if column is not None and weights is not None:
        raise ValueError("there are data.teacher_column and objective.teacher_weights; a row has one teacher or all")
    if column is None and weights is None and len(cfg.teachers) > 1:
        raise ValueError(
            f"there are {len(cfg.teachers)} teachers: data.teacher_column must name the column that says which one "
            "each row has, or objective.teacher_weights must mix them"
        )
    if weights is not None and weights.keys() != cfg.teachers.keys():
        raise ValueError(
            f"objective.teacher_weights names {_listed(weights)}, and `teachers` {_listed(cfg.teachers)}; they must be "
            "the same"
        )
    _refuse_unequal(cfg)


def _refuse_unequal(cfg: TrainerConfig) -> None:
    for name, teacher in cfg.teachers.items():
        if teacher.follows_student is not None:
            raise ValueError(f"teachers.{name}.follows_student: only a single `teacher` can follow the student")
    ahead = {name: teacher.prefetch for name, teacher in cfg.teachers.items()}
    if len(set(ahead.values())) > 1:
        raise ValueError(f"teachers have different prefetch ({ahead}); a micro-batch is asked of all of them at once")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
