"""Builds what compares the student's layers with the teacher's, and refuses layers that are none."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.head import output_head
from kdmesh.models.layer_outputs import num_layers
from kdmesh_trainer.algorithms.layer_distance import LayerDistance
from kdmesh_trainer.algorithms.seam import Algorithm
from kdmesh_trainer.builders.teachers import Teachers
from kdmesh_trainer.config import TrainerConfig


def refuse_unknown_layers(cfg: TrainerConfig) -> None:
    """Raises ConfigError when the student has not all layers of `objective.layers`, by its config.json.

    Nor the teacher, where that follows the student; of another the server says it.
    """
    if cfg.layers is None:
        return
    config = AutoConfig.from_pretrained(cfg.student.model, local_files_only=True, trust_remote_code=False)
    number = num_layers(config)
    why = cfg.layers.beyond(student=number, teacher=None if cfg.teacher_update_every is None else number)
    if why is not None:
        raise ConfigError(why)


def build_layer_distance(cfg: TrainerConfig, lm: PreTrainedModel, teachers: Teachers | None) -> LayerDistance | None:
    """Before the student is sharded, which it becomes a part of. None: no layers are compared."""
    if cfg.layers is None:
        return None
    assert teachers is not None
    torch.manual_seed(cfg.seed)  # its first values must be the same on every rank
    return LayerDistance(
        cfg.layers.pairs,
        distance=cfg.layers.distance,
        student_width=output_head(lm).hidden_size,
        teacher_width=teachers.only.pool.describe().hidden_size,
    )


def trained_beside(algorithm: Algorithm | None, layers: LayerDistance | None) -> nn.Module | None:
    """What has parameters that are trained with the student's."""
    parts = [part for part in (algorithm, layers) if isinstance(part, nn.Module)]
    return nn.ModuleList(parts) if len(parts) > 1 else next(iter(parts), None)
