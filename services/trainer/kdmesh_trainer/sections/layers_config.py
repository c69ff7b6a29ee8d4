"""Which hidden states below the last are compared too, as a trainer's configuration says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kdmesh.config import StrictModel

if TYPE_CHECKING:
    from kdmesh_trainer.config import TrainerConfig

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


def refuse_unfit_layers(cfg: TrainerConfig) -> None:
    """Raises ValueError when rows of the teacher's layers do not go with the rest of the configuration."""
    if cfg.layers is None:
        return
    if cfg.data.teacher_tokenizer is not None:
        raise ValueError("objective.layers does not go with data.teacher_tokenizer, whose rows are other positions")
    if cfg.teacher is None:
        raise ValueError("objective.layers takes a single `teacher`, not `teachers`")
    if cfg.teacher.wire == "fp8":
        raise ValueError(
            "objective.layers does not go with teacher.wire fp8, which has one scale for final hidden states and for "
            "outputs of layers, whose sizes differ much"
        )
