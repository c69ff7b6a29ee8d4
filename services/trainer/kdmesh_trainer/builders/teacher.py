"""Builds what talks to the teacher, and what brings it the student's weights where it follows the student."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from kdmesh.rpc.fleet.routing import RoutingPolicy
from kdmesh.rpc.teachers.pending_rows import PendingRows
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.rpc.weights.services import TEACHERS
from kdmesh.types import TokenSequence
from kdmesh.weights.buckets import bucket_size
from kdmesh.weights.manifest import UpdatePolicy
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.fit import check_follower, check_frozen, common_vocabulary
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.head import HeadService
from kdmesh_trainer.publisher import StudentPublisher, TeacherPublisher
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.sections.teacher_config import TeacherConfig, teacher_key
from kdmesh_trainer.sources.batches import TeacherRows
from kdmesh_trainer.sources.early_rows import KeepingService
from kdmesh_trainer.sources.outage import LenientHead, LenientRows, Outage
from kdmesh_trainer.stop import StopSignals
from kdmesh_trainer.student.model import Student
from kdmesh_trainer.teacher_copy import TeacherCopy

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The servers of one model."""

    key: str  # of its section in the configuration
    cfg: TeacherConfig
    job: str  # whose connection it is
    pool: TeacherPool
    rows: KeepingService
    final_rows: KeepingService  # without the outputs of layers: what a student is judged by
    head: HeadService
    vocabulary_size: int  # real tokens that it shares with the student

    def identity(self) -> dict[str, str]:
        """What a checkpoint can only be continued with, by configuration key."""
        model = self.pool.describe()
        identity = {f"{self.key} (fingerprint)": model.model_fingerprint}
        if self.cfg.follows_student is not None:
            told = self.cfg.follows_student.model_dump(mode="json", include={"every", "decay"})
            identity[f"{self.key}.follows_student"] = json.dumps(told, sort_keys=True)
            identity[f"{self.key} (dtype)"] = (
                model.dtype.value
            )  # the fingerprint of one that changes says nothing of it
        return identity


def open_teacher(
    cfg: TrainerConfig,
    name: str,
    *,
    tokenizer_fingerprint: str,
    vocabulary_size: int,
    mesh: Mesh,
    signals: StopSignals,
    outage: Outage,
    stack: ExitStack,
) -> Teacher:
    """A connection to each of its servers, closed with `stack`. Collective.

    Args:
        name: among `teachers`; that of `teacher` is empty.
        tokenizer_fingerprint: that the teacher must have.
        vocabulary_size: real tokens of the tokenizer that it must have.
        signals: that end the wait for rows.
        outage: what becomes of rows, or a head, that do not come.

    Raises:
        ModelMismatch: the teacher does not fit the student, or this job.
        Unauthenticated, PermissionDenied: the teacher does not let this job in.
        DeadlineExpired: no teacher answers.
    """
    key, teacher = teacher_key(name), cfg.all_teachers[name]
    pool = stack.enter_context(
        TeacherPool(
            teacher.addresses,
            job=cfg.job_name,
            door=teacher.door,
            deadline_s=teacher.deadline_s,
            access=teacher.access,
            routing=RoutingPolicy(
                local_tokens=teacher.routing.local_tokens, hedge_after_s=teacher.routing.hedge_after_s
            ),
            wire=teacher.wire,
            gpu=mesh.device if mesh.device.type == "cuda" else None,
            uses_cache=not isinstance(cfg.source, OnPolicy),  # no sample comes twice
            layers=() if cfg.layers is None else cfg.layers.of_teacher,
        )
    )
    if not (isinstance(cfg.source, OnPolicy) and cfg.source.colocated):  # else they have their turn later
        mesh.on_first(pool.wake)  # a job that was killed may have left a teacher asleep
    model = pool.describe()
    if teacher.follows_student is None:
        check_frozen(model)
    size = common_vocabulary(model, tokenizer_fingerprint=tokenizer_fingerprint, vocabulary_size=vocabulary_size)
    facts = {"key": key, "teacher": model.name, "fingerprint": model.model_fingerprint, "dtype": model.dtype.value}
    log.info("teacher found", extra={**facts, "vocabulary_size": size})
    signals.at_last(pool.give_up)
    rows = LenientRows(pool, outage)
    return Teacher(
        key=key,
        cfg=teacher,
        job=cfg.job_name,
        pool=pool,
        rows=rows,
        final_rows=rows if cfg.layers is None else LenientRows(_FinalRows(pool), outage),
        head=LenientHead(pool, outage),
        vocabulary_size=size,
    )


@dataclass(frozen=True, slots=True)
class _FinalRows:
    """A LenientService that leaves out the outputs of layers."""

    pool: TeacherPool

    def submit(self, sequences: Sequence[TokenSequence], *, keep: bool = False) -> PendingRows:
        """See KeepingService."""
        return self.pool.submit(sequences, keep=keep, has_layers=False)

    def blank_rows(self, num_rows: int) -> TeacherRows:
        """See LenientService."""
        return self.pool.blank_rows(num_rows, has_layers=False)


def build_copy(teacher: Teacher, student: Student) -> TeacherCopy | None:
    """The weights of a teacher that follows the student; None when it is frozen.

    Args:
        student: sharded, with the weights that it starts from.

    Raises:
        ModelMismatch: the teacher does not take the student's weights.
    """
    follows = teacher.cfg.follows_student
    if follows is None:
        return None
    check_follower(teacher.pool.describe(), architecture_fingerprint=student.architecture_fingerprint())
    return TeacherCopy(student, every=follows.every, decay=follows.decay)


def build_publisher(
    teacher: Teacher, copy: TeacherCopy, student: Student, mesh: Mesh, signals: StopSignals, stack: ExitStack
) -> TeacherPublisher:
    """What brings `copy` to the teacher; its connections are closed with `stack`."""
    sender = stack.enter_context(_weight_sender(teacher, student, mesh)) if mesh.is_first else None
    if sender is not None:
        signals.at_last(sender.give_up)
    sending = StudentPublisher(student, sender, policy=UpdatePolicy.FINISH, mesh=mesh, weights=copy.weights)
    return TeacherPublisher(copy, sending, teacher.pool)


def _weight_sender(teacher: Teacher, student: Student, mesh: Mesh) -> WeightSender:
    cfg = teacher.cfg
    assert cfg.follows_student is not None
    return WeightSender(
        cfg.addresses,
        service=TEACHERS,
        job=teacher.job,
        bucket_bytes=bucket_size(student.size_bytes),
        door=cfg.follows_student.door,
        advertise=cfg.follows_student.advertise,
        device=mesh.device,
        deadline_s=cfg.deadline_s,
        access=cfg.access,
    )
