"""Builds all that a job learns from: its teacher, or a panel of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from kdmesh.errors import ConfigError
from kdmesh.losses import OutputHead
from kdmesh.rpc.teachers.needs import Needs
from kdmesh.types import PlacedImage, TokenSequence
from kdmesh_trainer.builders.teacher import Teacher, open_teacher
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.blend import parts_of
from kdmesh_trainer.data.encoding.sides import Addressed, TeacherSide
from kdmesh_trainer.data.encoding.tokenizer import TeacherTokens
from kdmesh_trainer.data.kept.stored import Stored, longest_of
from kdmesh_trainer.fit import check_images, check_lengths
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.head import Heads, TeacherHead
from kdmesh_trainer.objectives.panel_heads import PanelHeads
from kdmesh_trainer.sections.objective_config import Distill
from kdmesh_trainer.sections.teacher_config import teacher_key
from kdmesh_trainer.sources.outage import Outage
from kdmesh_trainer.sources.panel import Panel
from kdmesh_trainer.sources.row_queue import RowService
from kdmesh_trainer.stop import StopSignals


@dataclass(frozen=True, slots=True, kw_only=True)
class Teachers:
    """The only teacher, or all of several."""

    by_name: Mapping[str, Teacher]  # that of the only one is empty
    rows: RowService
    heads: Heads
    prefetch: int  # micro-batches
    vocabulary_size: int  # real tokens that all of them share with the student
    image_expansion: str  # as TeacherTokens has it
    outage: Outage

    @property
    def only(self) -> Teacher:
        """Where the configuration takes no other number of them."""
        (teacher,) = self.by_name.values()
        return teacher

    @property
    def final_rows(self) -> RowService:
        """As `rows`, of final hidden states alone: what a student is judged by."""
        return self.by_name[""].final_rows if "" in self.by_name else self.rows  # several have no others

    def doors(self) -> dict[str, str]:
        """Through which rows come now, and why through these."""
        return {name: why for teacher in self.by_name.values() for name, why in teacher.pool.stats().doors.items()}

    def imbalance(self) -> float | None:
        """Of the teacher whose replicas have the least equal work; None: none has several."""
        known = [teacher.pool.stats().imbalance for teacher in self.by_name.values()]
        return max((each for each in known if each is not None), default=None)

    def identity(self) -> dict[str, str]:
        """What a checkpoint can only be continued with, by configuration key."""
        return {key: value for teacher in self.by_name.values() for key, value in teacher.identity().items()}

    def first_heads(self, student_head: OutputHead) -> dict[str, OutputHead]:
        """Of each, over its real tokens, on the CPU, as it is for the first step; the only one has no name. Blocks.

        Args:
            student_head: as it is before that step, over its real tokens, on the CPU.
        """
        return {
            name: each.pool.head()[0].sliced(self.vocabulary_size)
            if each.cfg.follows_student is None
            # It gets these weights later; until then it has what an earlier job has left.
            else _rounded(student_head, getattr(torch, each.pool.describe().dtype.value))
            for name, each in self.by_name.items()
        }

    def check_requests(self, dataset: str, sequences: Sequence[TokenSequence]) -> None:
        """Return when every teacher takes what it will be asked for, from now on. Raises DataError."""
        longest = longest_of(sequences)
        for name, teacher in self.by_name.items():
            asked = [longest[key] for key in ("", name) if key in longest]
            images = list(_images_read(sequences, name))
            for most in asked:
                teacher.pool.require(Needs.of(tokens=most.tokens, rows=most.rows, images=images))
            model = teacher.pool.describe()
            check_images(dataset, images, model, image_expansion=self.image_expansion)
            for most in asked:
                check_lengths(dataset, tokens=most.tokens, rows=most.rows, teacher=model)


def _rounded(head: OutputHead, dtype: torch.dtype) -> OutputHead:
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
    return replace(head, weight_VD=head.weight_VD.to(dtype), bias_V=bias_V)


def _images_read(sequences: Sequence[TokenSequence], name: str) -> Iterator[PlacedImage]:
    """All that teacher `name` is shown."""
    for part in parts_of(sequences).values():
        for theirs in () if isinstance(part, Stored) else TeacherSide(part):
            if not isinstance(theirs, Addressed) or theirs.teacher_name == name:
                yield from theirs.images


def refuse_no_address(cfg: TrainerConfig) -> None:
    """Raises ConfigError when a teacher that the run asks has no address."""
    for name, teacher in cfg.asked_teachers.items():
        if not teacher.addresses:
            said = f"{teacher_key(name)}.addresses is empty; it must name at least one running teacher as host:port"
            raise ConfigError(said)


def open_teachers(
    cfg: TrainerConfig, *, tokens: TeacherTokens, mesh: Mesh, signals: StopSignals, stack: ExitStack
) -> Teachers | None:
    """None when nobody would ask one anything: without a section, and for SFT without held-out data.

    Args:
        tokens: of every teacher.
        signals: that end the wait for rows.

    Raises:
        ConfigError: no address is given.
        ModelMismatch: a teacher does not fit the student, or this job.
        DeadlineExpired: one does not answer.
    """
    refuse_no_address(cfg)
    if not cfg.asked_teachers:
        return None
    outage = Outage()
    teachers = {
        name: open_teacher(
            cfg,
            name,
            tokenizer_fingerprint=tokens.fingerprint,
            vocabulary_size=tokens.size,
            mesh=mesh,
            signals=signals,
            outage=outage,
            stack=stack,
        )
        for name in cfg.all_teachers
    }
    size = min(teacher.vocabulary_size for teacher in teachers.values())
    heads = {
        name: TeacherHead(teacher.head, vocabulary_size=size, device=mesh.device, shared=tokens.shared)
        for name, teacher in teachers.items()
    }
    weights = _weights(cfg)
    is_panel = bool(cfg.teachers)
    return Teachers(
        by_name=teachers,
        rows=Panel({name: teacher.rows for name, teacher in teachers.items()}, asks_all=weights is not None)
        if is_panel
        else teachers[""].rows,
        heads=PanelHeads(heads, weights=weights) if is_panel else heads[""],
        prefetch=max(teacher.prefetch for teacher in cfg.all_teachers.values()),
        vocabulary_size=size,
        image_expansion=tokens.image_expansion,
        outage=outage,
    )


def _weights(cfg: TrainerConfig) -> dict[str, float] | None:
    """Of the teachers in the mixture that every row learns; None where each row names its own."""
    if cfg.data.teacher_column is not None:
        return None
    weights = cfg.objective.teacher_weights if isinstance(cfg.objective, Distill) else None
    return weights or dict.fromkeys(cfg.all_teachers, 1.0)
