"""Which students a run writes as Hugging Face directories, and in which element type."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from kdmesh.config import StrictModel

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
