"""What a trainer asks of a teacher, held against that teacher's configuration before its model loads."""

from __future__ import annotations

from kdmesh.errors import ConfigError
from kdmesh.preflight.model_files import num_layers
from kdmesh_teacher.config import TeacherConfig, TransformersEngine
from kdmesh_teacher.sglang.config import SglangEngine
from kdmesh_trainer.config import TrainerConfig


def refuse_unfit_teacher(cfg: TrainerConfig, teacher: TeacherConfig) -> None:
    """Return when a server with that configuration can be a teacher of this job, as far as files tell.

    Raises:
        ConfigError: it is updatable and need not be, or must be and is not; or it does not give the outputs of the
            layers that are compared.
    """
    is_updatable = teacher.engine.updatable
    if is_updatable is not (cfg.teacher_update_every is not None):
        raise ConfigError(
            f"the teacher's engine.updatable is {str(is_updatable).lower()}, and the trainer's teacher.follows_student "
            f"is {'not ' if is_updatable else ''}set: both, or neither"
        )
    refuse_unknown_layers(cfg, teacher)


def refuse_unknown_layers(cfg: TrainerConfig, teacher: TeacherConfig) -> None:
    """Raises ConfigError when a server with that configuration does not give what `objective.layers` compares."""
    if cfg.layers is None:
        return
    engine = teacher.engine
    if isinstance(engine, SglangEngine) and engine.layers_refusal:
        raise ConfigError(f"objective.layers needs outputs of the teacher's layers: {engine.layers_refusal}")
    if isinstance(engine, TransformersEngine | SglangEngine):
        why = cfg.layers.beyond(teacher=num_layers(engine.model))
        if why:
            raise ConfigError(why)
