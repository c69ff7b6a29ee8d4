"""Which hidden states below the last are compared too, as a trainer's configuration says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kdmesh.config import StrictModel

_Layer = Annotated[int, Field(ge=1)]


class LayersConfig(StrictModel):
    """Outputs of the student's decoder layers against those of the teacher's, at the positions with a loss."""

    pairs: dict[_Layer, _Layer] = Field(min_length=1)
    """The teacher's layer by the student's, both counted from 1. Required."""

    weight: float = Field(gt=0)
    """Of the distance, which is the mean over pairs, beside kd_weight and ce_weight. Required."""

    distance: Literal["cosine", "mse"] = "cosine"
    """cosine: 1 - cos of the angle; mse: the mean of squared differences."""

    @property
    def of_student(self) -> tuple[int, ...]:
        """The student's layers, ascending."""
        return tuple(sorted(self.pairs))

    @property
    def of_teacher(self) -> tuple[int, ...]:
        """The teacher's layers, ascending."""
        return tuple(sorted(set(self.pairs.values())))

    def beyond(self, *, student: int | None = None, teacher: int | None = None) -> str | None:
        """Why models with so many layers do not go with these pairs; None: they do.

        Args:
            student: None where nobody knows.
            teacher: likewise.
        """
        sides = ("student", self.of_student, student), ("teacher", self.of_teacher, teacher)
        for side, layers, number in sides:
            if number is not None and layers[-1] > number:
                return f"objective.layers.pairs names layer {layers[-1]} of the {side}, which has layers 1 to {number}"
        return None
