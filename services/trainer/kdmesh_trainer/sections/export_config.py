"""Which students a run writes as Hugging Face directories, and in which element type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field

from kdmesh.config import StrictModel

if TYPE_CHECKING:
    from kdmesh_trainer.config import TrainerConfig

Matrices: TypeAlias = Literal["rounded", "masters", "both"]
BestFigure: TypeAlias = Literal["kl_nats_per_token", "cross_entropy_nats_per_token", "accuracy"]


class ExportConfig(StrictModel):
    """The student as Hugging Face directories: `final` at the end, always, and others on the way."""

    dtype: Literal["origin", "float32", "bfloat16"] = "origin"
    """Element type of what is written; origin: that of student.model's files."""

    matrices: Matrices = "rounded"
    """What is written of the matrices of student.quantization: as the student computes with them, in few bits; the
    masters that are trained, in `dtype`; or both, the masters in the directory `masters` inside of the other."""

    every: int | None = Field(None, ge=1)
    """Steps between students that are written to `models`, all of which stay there; null: none."""

    best: BestFigure | None = None
    """Figure of the evaluations after the first step, by which the best student is kept in `best`; null: none is
    kept."""


def refuse_unfit_export(cfg: TrainerConfig) -> None:
    """Raises ValueError when the exports are to have matrices in few bits and there are none."""
    if cfg.export.matrices != "rounded" and cfg.student.quantization is None:
        raise ValueError(f"export.matrices {cfg.export.matrices} needs student.quantization")


def refuse_unknown_best(cfg: TrainerConfig) -> None:
    """Raises ValueError when no evaluation has the figure that the best student is known by."""
    best = cfg.export.best
    if best == "accuracy" and cfg.evaluation.questions is None:
        raise ValueError("export.best accuracy needs evaluation.questions")
    if best in ("kl_nats_per_token", "cross_entropy_nats_per_token") and cfg.data.held_out is None:
        raise ValueError(f"export.best {best} needs data.held_out")
    if best == "kl_nats_per_token" and not cfg.all_teachers:
        raise ValueError("export.best kl_nats_per_token needs a `teacher`")
