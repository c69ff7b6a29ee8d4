"""Everything the trainer can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdmesh.auth.config import AccessConfig
from kdmesh.config import StrictModel
from kdmesh.tracing.config import TracingConfig
from kdmesh_trainer.sections.algorithm_config import refuse_unfit_algorithm
from kdmesh_trainer.sections.data_config import DataConfig
from kdmesh_trainer.sections.environment_config import EnvironmentConfig, refuse_unfit_environment
from kdmesh_trainer.sections.export_config import ExportConfig, refuse_unfit_export, refuse_unknown_best
from kdmesh_trainer.sections.judge_config import JudgeConfig, refuse_unfit_judge
from kdmesh_trainer.sections.layers_config import LayersConfig, refuse_unfit_layers
from kdmesh_trainer.sections.metrics_config import MetricsConfig
from kdmesh_trainer.sections.objective_config import Distill, SampledReverseKL, Sft
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.other_names import OTHER_NAMES
from kdmesh_trainer.sections.panel_config import TeacherName, refuse_unfit_teachers
from kdmesh_trainer.sections.parallel_config import ParallelConfig, refuse_unfit_context, refuse_unfit_head
from kdmesh_trainer.sections.profile_config import ProfileConfig
from kdmesh_trainer.sections.quantization_config import refuse_unfit_quantization
from kdmesh_trainer.sections.questions_config import refuse_unasked_questions
from kdmesh_trainer.sections.replicas_config import ReplicatedConfig, check_can_be_known
from kdmesh_trainer.sections.rollouts_config import RolloutsConfig, SamplingConfig, SendingConfig
from kdmesh_trainer.sections.schedule_config import (
    CheckpointConfig,
    EvaluationConfig,
    refuse_idle_evaluation,
    unfit_length,
)
from kdmesh_trainer.sections.student_config import StudentConfig


class FollowConfig(SendingConfig):
    """Self-distillation: the teacher servers get the student's weights as it learns, and serve no other job."""

    every: int = Field(1, ge=1)
    """Optimizer steps between two updates of the teacher."""

    decay: float | None = Field(None, gt=0, lt=1)
    """The teacher is a moving average, a <- decay * a + (1 - decay) * student after every step; null: the student."""


class TeacherConfig(ReplicatedConfig):
    """The teacher servers that answer this job."""

    access: AccessConfig = AccessConfig()
    """How this job gets in; with `follows_student` it must be an operator there."""

    door: Literal["auto", "shm", "rdma", "collective", "stream"] = "auto"
    """How rows travel; auto takes the first that works of shared memory (on one node), RDMA, NCCL (a group with a
    server that makes them, where both hold a GPU) and the stream."""

    wire: Literal["exact", "fp8"] = "exact"
    """How a stream carries rows: fp8 halves the bytes of 16-bit rows, for thin networks, and rounds every element by up
    to a sixteenth (docs/across_nodes.md). Other doors, and the head, are always exact."""

    prefetch: int = Field(4, ge=0)
    """Micro-batches each rank asks for ahead of the one it trains on; 0 asks only when needed."""

    deadline_s: float = Field(300.0, gt=0)
    """Longest wait for one answer, or for an update with `follows_student`, a teacher's restart included."""

    follows_student: FollowConfig | None = None
    """Replace the teacher's weights by the student's as it learns; null: the teacher is frozen."""

    @model_validator(mode="after")
    def _all_can_be_told(self) -> TeacherConfig:
        if self.follows_student is not None and self.has_names:
            raise ValueError("follows_student needs every address as host:port: new weights go to each of them")
        check_can_be_known(self.access, self.addresses)
        return self


class OffPolicy(StrictModel):
    """The data's own answers are trained on."""

    kind: Literal["off_policy"] = "off_policy"


class OnPolicy(StrictModel):
    """The student's own answers to the data's prompts are trained on; batch.sequences counts samples."""

    kind: Literal["on_policy"]

    rollouts: RolloutsConfig = RolloutsConfig()
    """Who samples."""

    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt; divides batch.sequences."""

    sampled_fraction: float = Field(1.0, gt=0, le=1)
    """Share of batch.sequences that is sampled, to the nearest whole prompt; the rest are the data's own answers."""

    sampling: SamplingConfig = SamplingConfig()
    """How they are drawn."""

    environment: EnvironmentConfig | None = None
    """What answers the student, so that samples have several turns (docs/on_policy.md); null: nobody does."""

    judge: JudgeConfig | None = None
    """How much each sample counts (docs/on_policy.md); null: all count alike."""

    max_staleness: int = Field(0, ge=0)
    """Updates of the student that a sample's weights may be behind those it trains; 0 samples and trains in turn."""

    update_policy: Literal["finish", "abort", "continue"] = "finish"
    """What becomes of samples that are being drawn when new weights come: finished on the old ones first, drawn again,
    or continued with the new ones."""

    colocated: bool = False
    """Student, rollout servers and teachers share their devices, so who has no turn gives the memory back and sleeps;
    needs max_staleness 0. The servers then serve this job alone."""

    early_rows_mib: int = Field(1024, ge=0)
    """Memory of each rank for rows that the teacher computes while other samples of the step are still drawn; 0 asks
    for them when all are here."""

    too_long: Literal["drop", "fail"] = "drop"
    """What happens to a prompt that leaves no room for max_new_tokens in data.max_tokens; dropped ones are counted."""

    overlap_tokens: int = Field(8, ge=0, le=128)
    """How many of the likeliest tokens of student and teacher are compared in every row; 0 compares none."""

    show_every: int | None = Field(None, ge=1)
    """Steps between looks at a prompt with its responses, in the log and in samples.jsonl; null shows none."""

    def prompts_of(self, sequences: int) -> int:
        """How many prompts of a step with that many sequences are sampled from."""
        return int(self.sampled_fraction * sequences / self.samples_per_prompt + 0.5)

    @model_validator(mode="after")
    def _takes_turns(self) -> OnPolicy:
        if self.colocated and self.max_staleness > 0:
            raise ValueError(f"colocated needs max_staleness 0, not {self.max_staleness}: they work in turn")
        return self


class BatchConfig(StrictModel):
    """How sequences become steps and micro-batches."""

    sequences: int = Field(32, ge=1)
    """Sequences of one optimizer step, over all ranks."""

    max_tokens: int = Field(8192, ge=8)
    """Tokens of one micro-batch on one rank, or on the ranks of `parallel.context` together; a longer single sequence
    is refused."""


TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class TrainerConfig(StrictModel):
    """One training job."""

    other_names = OTHER_NAMES

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

    ranks: int | None = Field(None, ge=1)
    """Processes that `kdmesh train` starts here; null takes one per GPU, or one on the CPU."""

    @property
    def job_name(self) -> str:
        """By which servers and dashboards know the run: the last part of `output`."""
        return self.output.resolve().name

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
    def layers(self) -> LayersConfig | None:
        """Hidden states below the last that are compared; None: there are none."""
        return self.objective.layers if isinstance(self.objective, Distill) else None

    @model_validator(mode="after")
    def _ends(self) -> TrainerConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("how long is the run? give steps or epochs")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps ({self.steps}) or epochs ({self.epochs:g}), not both; null leaves one out")
        if self.steps is not None and (why := unfit_length(self, self.steps)) is not None:
            raise ValueError(why)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> TrainerConfig:
        if isinstance(self.objective, Distill) and not self.all_teachers:
            raise ValueError("objective distill needs a `teacher` section, or `teachers`")
        if self.teacher_update_every is not None and not isinstance(self.objective, Distill):
            raise ValueError("teacher.follows_student needs objective distill: nobody else learns from the teacher")
        if self.optimizer.name == "muon" and self.student.lora is not None:
            raise ValueError(
                "optimizer.name muon does not go with student.lora, whose factors are no maps of their own"
            )
        if self.optimizer.name == "muon" and self.parallel.offload == "all":
            raise ValueError("optimizer.name muon does not go with parallel.offload all: it multiplies whole matrices")
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers names one twice: {', '.join(self.trackers)}")
        if (longest := self.data.max_tokens) > self.batch.max_tokens:
            raise ValueError(f"data.max_tokens ({longest}) must not exceed batch.max_tokens ({self.batch.max_tokens})")
        return self

    @model_validator(mode="after")
    def _context_is_used(self) -> TrainerConfig:
        if self.data.teacher_context is not None and not isinstance(self.objective, Distill):
            raise ValueError("data.teacher_context needs objective distill: nobody else learns from the teacher")
        return self

    @model_validator(mode="after")
    def _tokenizers_fit(self) -> TrainerConfig:
        if self.data.teacher_tokenizer is None:
            if isinstance(self.objective, Distill) and self.objective.compares_chunks:
                raise ValueError(
                    f"objective.algorithm {self.objective.algorithm.name} compares two tokenizers, so it needs "
                    "data.teacher_tokenizer"
                )
            return self
        if self.teacher is None:
            raise ValueError("data.teacher_tokenizer needs one `teacher`")
        if isinstance(self.source, OnPolicy) and self.data.token_cache is not None:
            raise ValueError(
                "data.token_cache does not go with data.teacher_tokenizer and source on_policy, which need the text"
            )
        if isinstance(self.objective, Distill) and isinstance(self.objective.divergence, SampledReverseKL):
            raise ValueError(
                "divergence sampled_reverse_kl does not go with data.teacher_tokenizer, whose tokens differ"
            )
        if self.teacher.follows_student is not None:
            raise ValueError("data.teacher_tokenizer does not go with teacher.follows_student, which has the student's")
        return self

    @model_validator(mode="after")
    def _teachers_fit(self) -> TrainerConfig:
        refuse_unfit_teachers(self)
        return self

    @model_validator(mode="after")
    def _evaluations_judge(self) -> TrainerConfig:
        refuse_unasked_questions(self)
        refuse_idle_evaluation(self)
        refuse_unknown_best(self)
        refuse_unfit_export(self)
        return self

    @model_validator(mode="after")
    def _rounding_fits(self) -> TrainerConfig:
        refuse_unfit_quantization(self)
        return self

    @model_validator(mode="after")
    def _algorithm_fits(self) -> TrainerConfig:
        if isinstance(self.objective, Distill):
            refuse_unfit_algorithm(self, self.objective)
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> TrainerConfig:
        refuse_unfit_layers(self)
        return self

    @model_validator(mode="after")
    def _head_can_be_spread(self) -> TrainerConfig:
        refuse_unfit_head(self)
        return self

    @model_validator(mode="after")
    def _context_fits(self) -> TrainerConfig:
        refuse_unfit_context(self)
        return self

    @model_validator(mode="after")
    def _drawn_from_the_student(self) -> TrainerConfig:
        if not (isinstance(self.objective, Distill) and isinstance(self.objective.divergence, SampledReverseKL)):
            return self
        if not (isinstance(self.source, OnPolicy) and self.source.sampled_fraction == 1):
            raise ValueError("divergence sampled_reverse_kl needs source on_policy and every token of it sampled")
        sampling = self.source.sampling
        ends = {"max_new_tokens": sampling.max_new_tokens, "stop_strings": sampling.stop_strings}
        if sampling != SamplingConfig(temperature=sampling.temperature, **ends):
            raise ValueError("divergence sampled_reverse_kl needs sampling by temperature alone: tokens drawn from all")
        if self.objective.temperature != self.source.sampling.temperature:
            raise ValueError(
                f"divergence sampled_reverse_kl needs objective.temperature ({self.objective.temperature}) to be "
                f"source.sampling.temperature ({self.source.sampling.temperature})"
            )
        return self

    @model_validator(mode="after")
    def _source_fits(self) -> TrainerConfig:
        if not isinstance(self.source, OnPolicy):
            return self
        if not isinstance(self.objective, Distill):
            raise ValueError("source on_policy needs objective distill: its samples are nothing to imitate")
        if self.source.judge is not None:
            refuse_unfit_judge(self, self.source.judge)
        if self.source.environment is not None:
            refuse_unfit_environment(self)
        if self.data.has_weights and self.source.sampled_fraction == 1:
            raise ValueError(
                "data.train.weight_column needs source.sampled_fraction below 1 with source on_policy: weights are of "
                "the data's own answers"
            )
        if self.objective.imitates_data and self.source.sampled_fraction == 1:
            raise ValueError(
                f"objective.ce_weight ({self.objective.ce_weight}) must be 0 with source on_policy, whose tokens are "
                "the student's own"
            )
        sampled = self.source.prompts_of(self.batch.sequences) * self.source.samples_per_prompt
        if self.source.sampled_fraction == 1 and sampled != self.batch.sequences:
            raise ValueError(
                f"batch.sequences ({self.batch.sequences}) must be a multiple of source.samples_per_prompt "
                f"({self.source.samples_per_prompt})"
            )
        if self.source.sampled_fraction < 1 and not 0 < sampled < self.batch.sequences:
            raise ValueError(
                f"source.sampled_fraction ({self.source.sampled_fraction}) makes {sampled} samples of batch.sequences "
                f"({self.batch.sequences}) at {self.source.samples_per_prompt} per prompt; it must leave some of both"
            )
        if self.source.sampling.max_new_tokens >= self.data.max_tokens:
            raise ValueError(
                f"source.sampling.max_new_tokens ({self.source.sampling.max_new_tokens}) must be less than "
                f"data.max_tokens ({self.data.max_tokens}), which a prompt takes a part of"
            )
        return self
