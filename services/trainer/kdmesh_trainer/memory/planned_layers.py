"""What comparing layers takes, beside the loss of the distributions."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from kdmesh.losses import FusedLoss, OutputHead
from kdmesh.models.head import output_head
from kdmesh_trainer.algorithms.layer_distance import LayerDistance
from kdmesh_trainer.memory.job import Job, TeacherHead
from kdmesh_trainer.memory.live_bytes import LiveBytes
from kdmesh_trainer.student.model import RowLoss


def layers_to_compare(job: Job, lm: PreTrainedModel) -> LayerDistance | None:
    """What compares them, a part of the student. None: nothing does, or the teacher is not known."""
    if job.layers is None or not job.teachers:
        return None
    return LayerDistance(
        job.layers.pairs,
        distance=job.layers.distance,
        student_width=output_head(lm).hidden_size,
        teacher_width=job.teachers[0].hidden_size,
    )


def with_layers(row_loss: RowLoss, distance: LayerDistance, teacher: TeacherHead, live: LiveBytes) -> RowLoss:
    """The same loss, and after it the distance of layers from rows of that teacher, which come to the device."""

    def loss_of(hidden_RD: Tensor, head: OutputHead, labels_R: Tensor, *layers: Tensor) -> FusedLoss:
        loss = row_loss(hidden_RD, head, labels_R)
        with live.counted_as("loss"):
            columns = (1 + distance.num_teacher_layers) * teacher.hidden_size
            distance_R = distance(layers, hidden_RD.new_empty(len(hidden_RD), columns, dtype=teacher.dtype))
            return replace(loss, loss_sum=loss.loss_sum + distance_R.sum())

    return loss_of
