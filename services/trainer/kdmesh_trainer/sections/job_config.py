"""The sections of a training job, each of them valid by itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kdmesh.config import StrictModel
from kdmesh.tracing.config import TracingConfig
from kdmesh_trainer.sections.batch_config import BatchConfig
from kdmesh_trainer.sections.data_config import DataConfig
from kdmesh_trainer.sections.export_config import ExportConfig
from kdmesh_trainer.sections.layers_config import LayersConfig
from kdmesh_trainer.sections.metrics_config import MetricsConfig
from kdmesh_trainer.sections.objective_config import Distill, Sft
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import ParallelConfig
from kdmesh_trainer.sections.profile_config import ProfileConfig
from kdmesh_trainer.sections.schedule_config import CheckpointConfig, EvaluationConfig
from kdmesh_trainer.sections.source_config import OffPolicy, OnPolicy
from kdmesh_trainer.sections.student_config import StudentConfig
from kdmesh_trainer.sections.teacher_config import TeacherConfig, TeacherName

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class JobSections(StrictModel):
    """All that a training job is told; kdmesh_trainer/rules says which of it goes together."""

    output: Path
    """Directory of checkpoints, metrics and the final model; a second start continues what lies in it."""

    student: StudentConfig
    """The model that learns."""

    teacher: TeacherConfig | None = None
    """Where the teacher's rows come from; `distill` needs it, or `teachers`; optional for `sft`."""

    teachers: dict[TeacherName, TeacherConfig] = Field(default_factory=dict)
    """Several teachers by name, instead of `teacher`: every row has one, or learns their mixture."""

    objective: Annotated[Distill | Sft, Field(discriminator="name")] = Distill()
    """What is minimised."""

    data: DataConfig
    """What it is trained on."""

    source: Annotated[OffPolicy | OnPolicy, Field(discriminator="kind")] = OffPolicy()
    """Whose answers it is trained on."""

    batch: BatchConfig = BatchConfig()
    """Steps and micro-batches."""

    parallel: ParallelConfig = ParallelConfig()
    """How ranks share the student and its tokens, and where they keep it."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps in all; the data is repeated as often as needed, reshuffled each epoch. This or `epochs`."""

    epochs: float | None = Field(None, gt=0)
    """How often the data is walked through, instead of `steps` (docs/schedule.md)."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """When and how the student is judged."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saved state."""

    export: ExportConfig = ExportConfig()
    """The student as directories that others load."""

    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Beside the console and metrics.jsonl, which are always written. W&B and MLflow go by their own environment
    variables, WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME for example; otherwise the project is called kdmesh."""

    metrics: MetricsConfig | None = None
    """Where Prometheus reads how the run goes; null: nowhere."""

    tracing: TracingConfig | None = None
    """Where traces of steps go, with what teachers do for them; null: nowhere."""

    profile: ProfileConfig | None = None
    """Steps to look into (docs/profiling.md); null: none."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Order of the data and initial weights."""

    ranks: int | None = Field(None, ge=1, le=1024)
    """Processes that `kdmesh train` starts here; null takes one per GPU, or one on the CPU."""

    @property
    def job_name(self) -> str:
        """By which servers and dashboards know the run: the last part of `output`."""
        return Path(os.path.abspath(self.output)).name

    @property
    def teacher_update_every(self) -> int | None:
        """Steps between two updates of the teacher; None: it is frozen."""
        follows = None if self.teacher is None else self.teacher.follows_student
        return None if follows is None else follows.every

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """By name; that of the only one of `teacher` is empty."""
        return self.teachers if self.teacher is None else {"": self.teacher}

    @property
    def asked_teachers(self) -> dict[str, TeacherConfig]:
        """Those of them that the run asks; none for SFT without held-out data."""
        is_asked = isinstance(self.objective, Distill) or self.data.held_out is not None
        return self.all_teachers if is_asked else {}

    @property
    def layers(self) -> LayersConfig | None:
        """Hidden states below the last that are compared; None: there are none."""
        return self.objective.layers if isinstance(self.objective, Distill) else None
