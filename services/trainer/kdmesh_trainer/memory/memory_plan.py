"""What one rank of a job will hold, found by its own code on tensors without memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

# The only backend that needs no other rank; torch keeps it among its tests.
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel
from transformers.integrations import moe

from kdmesh.errors import ConfigError
from kdmesh.losses import FusedLoss, OutputHead, VocabularyShare
from kdmesh.losses.footprint import Footprint, loss_footprint, slice_footprint
from kdmesh.models.body import empty_causal_lm, without_memory
from kdmesh.models.context import ContextGroup
from kdmesh.models.head import output_head
from kdmesh.models.images.vision import reads_images
from kdmesh.models.packing import PackedTokens, pack, slice_of
from kdmesh.types import TokenSequence
from kdmesh_trainer.memory.job import Job, TeacherHead
from kdmesh_trainer.memory.live_bytes import LiveBytes
from kdmesh_trainer.memory.planned_layers import layers_to_compare, with_layers
from kdmesh_trainer.memory.planned_tower import SmallImage, freeze_unseen, images_to_learn_from, small_image
from kdmesh_trainer.mesh import context_group, device_mesh
from kdmesh_trainer.optimization.optimizer import check_optimizer, optimizer_over
from kdmesh_trainer.student.freezing import freeze, freeze_vision
from kdmesh_trainer.student.lora import Adapter, inject_without_memory
from kdmesh_trainer.student.model import (
    RowLoss,
    Student,
    begin_micro_batch,
    checkpoint_activations,
    default_unit,
    shard,
    units,
)
from kdmesh_trainer.student.rounded_modules import round_modules
from kdmesh_trainer.teacher_copy import TeacherCopy

_TOKEN = 1
_NO_WAIT = timedelta(seconds=1)  # for ranks that are not there


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes of one rank, by what they are for; what a step needs besides is that of its worst moment."""

    resident: Counter[str]  # between steps
    phases: dict[str, Counter[str]]  # at the worst moment of each part of a step
    host: Counter[str]  # at the host's worst moment, if it keeps something

    @property
    def worst_phase(self) -> str:
        """Where most is held."""
        return max(self.phases, key=lambda name: self.phases[name].total())


def plan(job: Job) -> Plan:
    """Run two steps of the job's largest micro-batch without memory. The process must be in no process group.

    Raises:
        ConfigError: the student's directory is not a model that can be trained, its optimizer is not installed,
            `freeze` names nothing, or everything, `quantization` does not fit its modules, or what its layers take
            depends on the values of their inputs.
    """
    check_optimizer(job.optimizer)
    try:
        return _plan(job)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"{job.student} cannot be planned without memory: its layers look at values, as mixtures do whose experts "
            f"come one after the other ({error})"
        ) from error


def _plan(job: Job) -> Plan:
    live = LiveBytes(copies_exchanged=job.device.type == "cpu")
    row, image = _packed(job), small_image(job.student) if job.trains_vision else None  # while tensors have values
    with (
        _ranks(job) as (mesh, context),
        _experts_in_every_type(),
        without_memory() as fake,
        live.watching(),
    ):
        with live.counted_as("parameters"):
            lm, adapter = _lm(job, image)
            seen = images_to_learn_from(lm) if job.trains_vision else lambda row_loss: row_loss
            unit_parameters = default_unit(job.device.type)
            gathered = units(lm, unit_parameters)
            distance = layers_to_compare(job, lm)
            student = Student(
                lm,
                vocabulary_size=job.vocabulary_size,
                adapter=adapter,
                algorithm=distance,
                context=context,
                exchange=job.exchange,
                layers=() if distance is None else distance.of_student,
            )
            head_share = _EqualRanks if job.spreads_head else None
            shard(
                student,
                mesh,
                compute_dtype=job.compute_dtype,
                gather=job.gather,
                unit_parameters=unit_parameters,
                offloads=job.offloads,
                head_share=head_share,
            )
        for stand_in in () if student.compute_copy is None else student.compute_copy.copies:
            live.rename(stand_in, "gathered parameters")
        copies = _give_to_host(student, live, gathered) if job.uses_host else 0
        optimizer = optimizer_over(student, job.optimizer, algorithm=distance)
        with live.counted_as("teacher's weights", on_host=job.uses_host):
            follows = job.follows
            copy = None if follows is None else TeacherCopy(student, every=follows.every, decay=follows.decay)
        packed = _without_memory(row, fake)
        footprint = _footprint(job, student, packed)
        with live.counted_as("teacher's head"):
            heads = [_head(teacher, _num_tokens(job, student)) for teacher in job.teachers]
        phases: dict[str, Counter[str]] = {}
        workspace: list[Tensor] = []
        row_loss = seen(_Loss(footprint, live, workspace))
        if distance is not None:
            row_loss = with_layers(row_loss, distance, job.teachers[0], live)
        for _ in range(2):  # the second has what the first leaves behind
            phases = _step(job, live, student, optimizer, packed, row_loss)
        resident = +live.device.held
        del heads, student, optimizer, copy, workspace, row_loss, distance
    for name in ("forward", "backward"):
        phases[name]["copies of shards"] += copies
    return Plan(resident=resident, phases={name: +worst for name, worst in phases.items()}, host=+live.host.worst)


def _lm(job: Job, image: SmallImage | None) -> tuple[PreTrainedModel, Adapter | None]:
    """The student as it is before it is sharded, and what was put into it."""
    lm, adapter = empty_causal_lm(job.student), None
    if job.lora is not None:
        adapter = inject_without_memory(lm, job.lora)
    if reads_images(lm.config) and not job.trains_vision:
        freeze_vision(lm)
    if image is not None:
        freeze_unseen(lm, image)
    if job.freeze:
        freeze(lm, job.freeze)
    for parameter in lm.parameters() if job.lora is not None or job.freeze else ():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.detach().to(job.frozen_dtype)
    if job.quantization is not None:
        round_modules(lm, job.quantization, job.compute_dtype)
    if job.checkpointed_every is not None:
        checkpoint_activations(lm, every=job.checkpointed_every)
    return lm, adapter


@contextmanager
def _ranks(job: Job) -> Iterator[tuple[DeviceMesh, ContextGroup | None]]:
    """All ranks, as the first sees them, and those that hold rows of tokens together, as that at `job.place` does."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=job.ranks)
    try:
        mesh = device_mesh("cpu", shard_ranks=job.shard_ranks or job.ranks, timeout=_NO_WAIT)
        context = context_group(job.context, timeout=_NO_WAIT)
        yield mesh, None if context is None else replace(context, place=job.place)
    finally:
        dist.destroy_process_group()


@contextmanager
def _experts_in_every_type() -> Iterator[None]:
    """Have experts multiplied by transformers' own operator, which keeps and makes what torch's does.

    Without memory torch's multiplies bfloat16 alone, though a CPU and a GPU multiply float32 with it too.
    """
    with mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: False):
        yield


def _give_to_host(student: Student, live: LiveBytes, gathered: list[list[nn.Module]]) -> int:
    """Count shards, and gradients from when they are reduced on, as the host's, where a CPU would not move them.

    Returns:
        Most bytes of copies that the device has of what it is about to gather together.
    """

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.move_to_host(parameter.grad, "gradients")

    sizes = {}
    for parameter in student.parameters():
        assert isinstance(parameter, DTensor)
        sizes[id(parameter)] = parameter.to_local().nbytes
        live.move_to_host(parameter, "parameters")
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
    together = [
        sum(sizes.pop(id(parameter), 0) for layer in unit for parameter in layer.parameters()) for unit in gathered
    ]
    return max(sum(sizes.values()), *together)


def _step(
    job: Job,
    live: LiveBytes,
    student: Student,
    optimizer: Optimizer,
    packed: PackedTokens,
    row_loss: RowLoss,
) -> dict[str, Counter[str]]:
    phases: dict[str, Counter[str]] = {}
    student.train()
    for is_last in (False, True) if job.accumulates else (True,):
        begin_micro_batch(student, is_last=is_last)
        live.device.begin_phase()
        with live.counted_as("activations"):
            loss_sum = student(packed, row_loss).loss_sum
        phases["forward"] = +live.device.worst
        live.device.begin_phase()
        with live.counted_as("gradients"):
            loss_sum.backward()
        del loss_sum
        phases["backward"] = +live.device.worst
    live.device.begin_phase()
    with live.counted_as("gradients", on_host=job.uses_host):
        clip_grad_norm_(student.parameters(), 1.0)
    name = {"adamw": "AdamW", "muon": "Muon"}[job.optimizer.name]
    with live.counted_as(name, on_host=job.uses_host):
        optimizer.step()
    if job.optimizer.moments == "8bit":
        live.device.begin_phase()  # what the update takes and gives back is not known: on a GPU it is compiled
    phases[name] = +live.device.worst
    optimizer.zero_grad(set_to_none=True)
    return phases


class _EqualRanks(VocabularyShare):
    """Of ranks that all have what this one has: there are no others, and no numbers in tensors without memory."""

    def numbers(self, *own: int) -> list[list[int]]:
        """As on every rank."""
        return [list(own)] * self.num_ranks


class _Loss:
    """Takes the memory that the fused loss takes, in its place: its kernels need real memory."""

    def __init__(self, footprint: Footprint, live: LiveBytes, workspace: list[Tensor]) -> None:
        """`workspace` keeps what a thread keeps from call to call."""
        self._footprint = footprint
        self._live = live
        self._workspace = workspace

    def __call__(self, hidden_RD: Tensor, head: OutputHead, labels_R: Tensor) -> FusedLoss:
        with self._live.counted_as("loss"):
            if not self._workspace:
                self._workspace.append(_bytes(self._footprint.kept_bytes))
            loss_sum: Tensor = _TakesMemory.apply(hidden_RD, head.weight_VD, head.bias_V, self._footprint)  # type: ignore[no-untyped-call]
            row_R = hidden_RD.new_empty(len(hidden_RD), dtype=torch.float32)
        return FusedLoss(
            loss_sum=loss_sum, **{field.name: row_R for field in fields(FusedLoss) if field.name != "loss_sum"}
        )


class _TakesMemory(torch.autograd.Function):
    """Scratch in forward, three gradients until backward, which multiplies them."""

    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, footprint: Footprint) -> Tensor:
        """[] a loss."""
        gradients = [
            None if tensor is None or not tensor.requires_grad else torch.empty_like(tensor, dtype=dtype)
            for tensor, dtype in ((hidden_RD, hidden_RD.dtype), (weight_VD, torch.float32), (bias_V, torch.float32))
        ]
        scratch = _bytes(footprint.scratch_bytes)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_RD.dtype, weight_VD.dtype, weight_VD.dtype
        del scratch
        return hidden_RD.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        """As the fused loss does it."""
        scaled = (
            None if gradient is None else torch.empty_like(gradient, dtype=dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None


def _footprint(job: Job, student: Student, packed: PackedTokens) -> Footprint:
    head = output_head(student.lm)
    if student.share is not None:
        return slice_footprint(
            num_rows=packed.num_rows * job.ranks,
            num_tokens=_num_tokens(job, student),
            hidden_sizes=(head.hidden_size, *(teacher.hidden_size for teacher in job.teachers)),
            dtype=job.compute_dtype,
            device=job.device,
        )
    return loss_footprint(
        num_rows=packed.num_rows,
        vocabulary_size=job.vocabulary_size,
        hidden_size=head.hidden_size,
        num_teachers=len(job.teachers),
        dtype=job.compute_dtype,
        device=job.device,
    )


def _num_tokens(job: Job, student: Student) -> int:
    """Of which a rank holds the teacher's head; where they are spread, on the first rank, which has most."""
    return job.vocabulary_size if student.share is None else student.share.num_tokens


def _head(teacher: TeacherHead, students_tokens: int) -> list[Tensor]:
    num_tokens = students_tokens if teacher.num_tokens is None else teacher.num_tokens
    weight = torch.empty(num_tokens, teacher.hidden_size, dtype=teacher.dtype)
    return [weight, torch.empty(num_tokens, dtype=teacher.dtype)] if teacher.has_bias else [weight]


def _packed(job: Job) -> PackedTokens:
    """The slice of the largest micro-batch at `job.place`, or all of it."""
    return slice_of(
        pack(
            [
                TokenSequence(
                    token_ids=np.full(length, _TOKEN, np.int32), positions=np.arange(length - 1, dtype=np.int32)
                )
                for length in job.lengths
            ]
        ),
        place=job.place,
        size=job.context,
    )


def _without_memory(packed: PackedTokens, fake: FakeTensorMode) -> PackedTokens:
    names = [field.name for field in fields(packed) if isinstance(getattr(packed, field.name), Tensor)]
    without_memory: dict[str, Any] = {name: fake.from_tensor(getattr(packed, name)) for name in names}
    return replace(packed, **without_memory)


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)
