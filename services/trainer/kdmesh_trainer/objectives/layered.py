"""What is minimised where layers of student and teacher are compared beside their distributions."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from kdmesh.losses import FusedLoss
from kdmesh_trainer.algorithms.layer_distance import LayerDistance
from kdmesh_trainer.algorithms.seam import StudentRows
from kdmesh_trainer.objectives.objective import Objective
from kdmesh_trainer.sources.batches import PanelRows, TeacherRows


@dataclass(frozen=True, slots=True, kw_only=True)
class LayeredLoss(FusedLoss):
    """A loss with what the layers had a part in."""

    layer_distance_R: Tensor  # [R] at least float32, without a weight


@dataclass(frozen=True, slots=True, kw_only=True)
class WithLayers:
    """Another objective, and weight * the distance of every row, which counts as much as the row does."""

    objective: Objective
    distance: LayerDistance
    weight: float

    def at(self, step: int) -> WithLayers:
        """See Objective."""
        return replace(self, objective=self.objective.at(step))

    def __call__(self, rows: StudentRows, teacher: TeacherRows | PanelRows | None) -> FusedLoss:
        """See Objective; the rows are answered by one teacher, with the outputs of its layers."""
        loss = self.objective(rows, teacher)
        if teacher is None:
            return replace(loss, loss_sum=loss.loss_sum + self.distance.nothing())
        assert not isinstance(teacher, PanelRows)
        distance_R = self.distance(rows.layers, teacher.rows_RD)
        weighed_R = distance_R if rows.weight_R is None else distance_R * rows.weight_R
        told = {field.name: getattr(loss, field.name) for field in fields(FusedLoss)}
        told["loss_sum"] = loss.loss_sum + self.weight * weighed_R.sum()
        return LayeredLoss(**told, layer_distance_R=distance_R.detach())
