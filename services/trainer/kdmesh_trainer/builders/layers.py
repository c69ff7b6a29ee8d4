"""Builds what compares the student's layers with the teacher's, and refuses layers that are none."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.body import empty_causal_lm, without_memory
from kdmesh.models.directory import read_config
from kdmesh.models.head import output_head
from kdmesh.models.layer_outputs import num_layers, numbered_layers
from kdmesh_trainer.algorithms.layer_distance import LayerDistance
from kdmesh_trainer.algorithms.seam import Algorithm
from kdmesh_trainer.builders.teachers import Teachers
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.sections.objective_config import Distill
from kdmesh_trainer.student.freezing import freeze
from kdmesh_trainer.student.lora import train_adapted


def refuse_unknown_layers(cfg: TrainerConfig) -> None:
    """Raises ConfigError when the student has not all layers of `objective.layers`, by its config.json.

    Nor the teacher, where that follows the student; of another the server says it.
    """
    if cfg.layers is None:
        return
    config = read_config(cfg.student.model)
    number = num_layers(config)
    why = cfg.layers.beyond(student=number, teacher=None if cfg.teacher_update_every is None else number)
    if why is not None:
        raise ConfigError(why)


def refuse_unreached(cfg: TrainerConfig) -> None:
    """Raises ConfigError when layers alone are compared, and the student trains nothing at or below them."""
    if cfg.layers is None or not (isinstance(cfg.objective, Distill) and cfg.objective.compares_layers_alone):
        return
    with without_memory():
        lm = empty_causal_lm(cfg.student.model)
        if cfg.student.lora is not None:
            train_adapted(lm, cfg.student.lora)
        elif cfg.student.freeze:
            freeze(lm, cfg.student.freeze)
        if any(parameter.requires_grad for parameter in reached(lm, highest=cfg.layers.of_student[-1])):
            return
    key = "freeze" if cfg.student.lora is None else "lora"
    raise ConfigError(
        f"student.{key} trains nothing that objective.layers reaches, which is layer {cfg.layers.of_student[-1]} and "
        "what is below it, and kd_weight and ce_weight are 0: nothing would be learnt"
    )


def reached(lm: PreTrainedModel, *, highest: int) -> list[nn.Parameter]:
    """Those that the output of a decoder layer depends on: all but what comes after it."""
    after = [layer for number, layer in numbered_layers(lm).items() if number > highest]
    after += [part for name, part in lm.get_decoder().named_children() if "norm" in name or name == "ln_f"]
    after += [lm.get_output_embeddings()]
    others = {id(parameter) for part in after for parameter in part.parameters()}
    others -= {id(parameter) for parameter in lm.get_input_embeddings().parameters()}  # which may be the head
    return [parameter for parameter in lm.parameters() if id(parameter) not in others]


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
