"""Builds a run from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import assert_never

import torch
from transformers import PreTrainedModel

from kdmesh.errors import ConfigError, NotFinite
from kdmesh.file_lock import claimed
from kdmesh.models.fingerprint import model_fingerprint
from kdmesh_trainer.builders.checked import Checked, check
from kdmesh_trainer.builders.data import Data, check_fit, read_data
from kdmesh_trainer.builders.evaluation import build_evaluator, build_examiner, digest_of_judge
from kdmesh_trainer.builders.layers import build_layer_distance, trained_beside
from kdmesh_trainer.builders.objective import build_algorithm, build_objective, build_optimizer
from kdmesh_trainer.builders.on_policy import Task, build_source
from kdmesh_trainer.builders.rollouts import Rollouts, open_rollouts
from kdmesh_trainer.builders.student import freeze_and_round, is_varlen, load_student, spread
from kdmesh_trainer.builders.student_length import warn_of_new_positions
from kdmesh_trainer.builders.teacher import build_copy, build_publisher
from kdmesh_trainer.builders.teachers import Teachers, open_teachers, refuse_no_address
from kdmesh_trainer.builders.vision import build_packer
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.devices import ScoringPublisher
from kdmesh_trainer.loop import Exporter, Parts, Publisher, Schedule
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.reporting.profiler import NoProfiler, TraceWriter
from kdmesh_trainer.reporting.telemetry import RunTelemetry, SilentTelemetry, open_telemetry
from kdmesh_trainer.saved_config import configured_identity, refuse_other_configuration, refuse_other_output
from kdmesh_trainer.saving.checkpoint import CheckpointDirectory
from kdmesh_trainer.saving.export import HuggingFaceExporter
from kdmesh_trainer.saving.export_adapter import AdapterExporter
from kdmesh_trainer.saving.snapshots import ModelSnapshots
from kdmesh_trainer.saving.start_record import record_start
from kdmesh_trainer.sections.objective_config import Distill, Sft
from kdmesh_trainer.sources.batches import Source
from kdmesh_trainer.sources.context_rows import ContextRows
from kdmesh_trainer.sources.off_policy import OffPolicySource
from kdmesh_trainer.sources.on_policy import OnPolicySource
from kdmesh_trainer.sources.plan import StepPlanner
from kdmesh_trainer.sources.sft import SftSource
from kdmesh_trainer.step import GradientStepper
from kdmesh_trainer.stop import AgreedStop, StopSignals
from kdmesh_trainer.student.lora import add_adapter
from kdmesh_trainer.student.model import Student
from kdmesh_trainer.teacher_copy import TeacherCopy


@contextmanager
def built(cfg: TrainerConfig, *, mesh: Mesh, signals: StopSignals) -> Iterator[tuple[Parts, Schedule]]:
    """Everything the loop talks to, for as long as the context lasts, and when things happen. Collective.

    Raises:
        ConfigError: a part of the configuration cannot be used.
        CheckpointError: it cannot continue the checkpoint that lies in `output`.
        DataError: the data cannot be used.
        ModelMismatch: the teacher does not fit the student.
        DeadlineExpired: no teacher answers.
    """
    with ExitStack() as stack:
        mesh.on_first(lambda: stack.enter_context(claimed(cfg.output)))
        mesh.on_first(lambda: refuse_other_configuration(cfg))
        if cfg.metrics is not None:
            mesh.on_first(cfg.metrics.refuse_taken)
        checked = check(cfg)
        if mesh.is_first:
            warn_of_new_positions(cfg)
        refuse_no_address(cfg)
        data = read_data(cfg, checked, mesh)  # first: what is wrong in files is not to wait for a server
        teachers = _teachers(cfg, checked, data, mesh, signals, stack)
        telemetry = stack.enter_context(_telemetry(cfg, teachers, mesh))
        is_shared = teachers is not None and checked.teacher_tokens.shared is None
        vocabulary_size = teachers.vocabulary_size if teachers is not None and is_shared else checked.vocabulary_size
        lm = load_student(cfg, vocabulary_size)
        identity = _identity(cfg, lm, data, teachers)
        _refuse_unequal_ranks(identity, mesh)
        mesh.on_first(lambda: refuse_other_output(cfg.output, identity, steps=data.steps))
        mesh.on_first(lambda: record_start(cfg, identity, ranks=mesh.world_size, device=mesh.device))
        adapter = None if cfg.student.lora is None else add_adapter(lm, cfg.student.lora, seed=cfg.seed)
        algorithm = build_algorithm(
            checked.build_algorithm,
            lm,
            teachers,
            vocabulary_size=vocabulary_size,
            tokens=checked.teacher_tokens,
            device=mesh.device,
            seed=cfg.seed,
        )
        distance = build_layer_distance(cfg, lm, teachers)
        packer = build_packer(lm, checked.image_reader, data.num_images, freeze_vision=cfg.student.freeze_vision)
        freeze_and_round(lm, cfg.student)
        student = Student(
            lm,
            vocabulary_size=vocabulary_size,
            adapter=adapter,
            algorithm=trained_beside(algorithm, distance),
            packer=packer,
            is_varlen=is_varlen(cfg.student, lm.config, mesh.device),
            context=mesh.context,
            exchange=cfg.parallel.exchange(lm.config.get_text_config().num_attention_heads),
            layers=() if cfg.layers is None else cfg.layers.of_student,
        )
        spread(student, cfg.student, mesh, cfg.parallel)
        torch.manual_seed(cfg.seed + mesh.rank)  # from here on, ranks may draw different numbers
        optimizer = build_optimizer(cfg, student)
        copy = None if teachers is None or cfg.teacher is None else build_copy(teachers.only, student)
        rollouts = open_rollouts(cfg, student, mesh, signals, stack)
        source = _source(cfg, checked, data, teachers, rollouts, student, mesh, stack)
        exporters = _exporters(cfg, student, checked, mesh)
        parts = Parts(
            source=source,
            stepper=GradientStepper(
                student,
                build_objective(cfg, checked.divergence, algorithm, teachers, student.share, distance),
                optimizer,
                config=cfg.optimizer,
                steps=data.steps,
                mesh=mesh,
                teachers=("",) if teachers is None else teachers.heads.names,
                outage=None if teachers is None else teachers.outage,
            ),
            publishers=tuple(_publishers(teachers, copy, student, source, mesh, signals, stack)),
            evaluator=build_evaluator(cfg, student, data.held_out, teachers, source, mesh),
            examiner=build_examiner(
                cfg,
                checked.exam,
                rollouts,
                tokenizer_fingerprint=checked.tokenizer_fingerprint,
                vocabulary_size=checked.vocabulary_size,
                reader=checked.image_reader,
                source=source,
                mesh=mesh,
            ),
            checkpoints=CheckpointDirectory(
                cfg.output / "checkpoints",
                student,
                optimizer,
                identity=identity,
                steps=data.steps,
                keep=cfg.checkpoint.keep,
                due_after_s=None if cfg.checkpoint.minutes is None else 60 * cfg.checkpoint.minutes,
                mesh=mesh,
                teacher_copy=copy,
            ),
            exporters=exporters,
            snapshots=None
            if cfg.export.every is None and cfg.export.best is None
            else ModelSnapshots(
                exporters[0],
                cfg.output,
                best=cfg.export.best,
                judged_by=digest_of_judge(cfg, data.held_out, teachers, checked.exam),
                mesh=mesh,
            ),
            stop=AgreedStop(signals, mesh),
            telemetry=telemetry,
            profiler=NoProfiler() if cfg.profile is None else TraceWriter(cfg.profile, output=cfg.output, mesh=mesh),
        )
        try:
            yield (
                parts,
                Schedule(
                    steps=data.steps,
                    evaluate_every=cfg.evaluation.every,
                    checkpoint_every=cfg.checkpoint.every,
                    export_every=cfg.export.every,
                ),
            )
        except NotFinite:  # on every rank
            mesh.on_first(telemetry.report_not_finite)
            raise


def _teachers(
    cfg: TrainerConfig, checked: Checked, data: Data, mesh: Mesh, signals: StopSignals, stack: ExitStack
) -> Teachers | None:
    """Open, and fit for the data."""
    teachers = open_teachers(cfg, tokens=checked.teacher_tokens, mesh=mesh, signals=signals, stack=stack)
    if teachers is not None:
        check_fit(cfg, data, teachers)
    return teachers


def _telemetry(
    cfg: TrainerConfig, teachers: Teachers | None, mesh: Mesh
) -> AbstractContextManager[RunTelemetry | SilentTelemetry]:
    doors = dict[str, str] if teachers is None else teachers.doors
    imbalance = (lambda: None) if teachers is None else teachers.imbalance
    return open_telemetry(cfg, rank=mesh.rank, doors=doors, imbalance=imbalance)


def _identity(cfg: TrainerConfig, lm: PreTrainedModel, data: Data, teachers: Teachers | None) -> dict[str, str]:
    """What a checkpoint can only be continued with. By content: a directory may have moved."""
    identity = {"student (fingerprint)": model_fingerprint(lm), **configured_identity(cfg), **data.identity}
    if teachers is not None and isinstance(cfg.objective, Distill):
        identity |= teachers.identity()
    return identity


def _refuse_unequal_ranks(identity: dict[str, str], mesh: Mesh) -> None:
    """Each rank loads and plans by itself, so all must have found the same."""
    for rank, other in enumerate(mesh.gather(identity)):
        for key, value in identity.items():
            if other[key] != value:
                raise ConfigError(
                    f"{key} is {value} on rank {mesh.rank} and {other[key]} on rank {rank}; "
                    "every rank must read the same"
                )


def _source(
    cfg: TrainerConfig,
    checked: Checked,
    data: Data,
    teachers: Teachers | None,
    rollouts: Rollouts | None,
    student: Student,
    mesh: Mesh,
    stack: ExitStack,
) -> SftSource | OffPolicySource | OnPolicySource:
    if isinstance(data.train, Task):
        assert teachers is not None and rollouts is not None
        return build_source(
            cfg,
            data.train,
            steps=data.steps,
            student=student,
            tokenizer_fingerprint=checked.tokenizer_fingerprint,
            teachers=teachers,
            rollouts=rollouts,
            mesh=mesh,
            stack=stack,
        )
    planner = StepPlanner(data.train, cfg.batch, seed=cfg.seed, rank=mesh.data_group, ranks=mesh.num_data_groups)
    match cfg.objective:
        case Distill():
            assert teachers is not None
            source = OffPolicySource(
                planner,
                teachers.rows,
                prefetch=teachers.prefetch,
                steps=data.steps,
                teacher_update_every=cfg.teacher_update_every,
                context=ContextRows.of(mesh, teachers.heads.names),
            )
            stack.callback(source.close)
            return source
        case Sft():
            return SftSource(planner)
        case _:
            assert_never(cfg.objective)


def _publishers(
    teachers: Teachers | None,
    copy: TeacherCopy | None,
    student: Student,
    source: Source,
    mesh: Mesh,
    signals: StopSignals,
    stack: ExitStack,
) -> Iterator[Publisher]:
    if teachers is not None and copy is not None:
        publisher = build_publisher(teachers.only, copy, student, mesh, signals, stack)
        yield ScoringPublisher(publisher, source.devices) if isinstance(source, OnPolicySource) else publisher
    if isinstance(source, OnPolicySource):
        yield source


def _exporters(
    cfg: TrainerConfig, student: Student, checked: Checked, mesh: Mesh
) -> tuple[HuggingFaceExporter, *tuple[Exporter, ...]]:
    origin = cfg.student.model
    whole = HuggingFaceExporter(
        cfg.output / "final",
        student,
        origin=origin,
        tokenizer=checked.tokenizer,
        mesh=mesh,
        end_of_turn=checked.encoder.end_of_turn(),
        dtype=None if cfg.export.dtype == "origin" else getattr(torch, cfg.export.dtype),
        matrices=cfg.export.matrices,
    )
    if student.adapter is None:
        return (whole,)
    return whole, AdapterExporter(cfg.output / "adapter", student, student.adapter, origin=origin, mesh=mesh)
