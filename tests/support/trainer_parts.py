"""Students, teachers and batches for tests of the trainer, without any service."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kdmesh.losses import OutputHead, VocabularyShare, forward_kl
from kdmesh.models.body import load_causal_lm
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.head import output_head
from kdmesh.models.images.packing import Packer
from kdmesh.models.images.reader import load_image_reader
from kdmesh.models.layer_outputs import captured, chosen_layers
from kdmesh.types import TokenSequence
from kdmesh_trainer.algorithms.dskd import DualSpaceKD
from kdmesh_trainer.algorithms.layer_distance import LayerDistance
from kdmesh_trainer.algorithms.seam import Algorithm, Setup, Terms
from kdmesh_trainer.algorithms.vanilla_kd import vanilla_kd
from kdmesh_trainer.builders.layers import trained_beside
from kdmesh_trainer.mesh import Mesh, device_mesh
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.objectives.layered import WithLayers
from kdmesh_trainer.objectives.objective import Distillation, Objective
from kdmesh_trainer.objectives.spread import spread
from kdmesh_trainer.optimization.optimizer import optimizer_over
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather, ParallelConfig
from kdmesh_trainer.sections.quantization_config import QuantizationConfig
from kdmesh_trainer.sources.batches import MicroBatch, StepBatch
from kdmesh_trainer.sources.context_rows import ContextRows, asking
from kdmesh_trainer.sources.row_queue import RowService
from kdmesh_trainer.step import GradientStepper
from kdmesh_trainer.student.compiled_layers import compile_layers
from kdmesh_trainer.student.freezing import freeze, rest_in_bfloat16
from kdmesh_trainer.student.lora import add_adapter
from kdmesh_trainer.student.model import Student, checkpoint_activations, shard
from kdmesh_trainer.student.rounded_modules import round_modules


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Rows that are here already."""

    rows_RD: Tensor
    weight_version: int = 1
    has_failed: bool = False
    is_done: bool = True

    def wait(self) -> Rows:
        """Themselves."""
        return self


class LocalTeacher:
    """A teacher in this process; each sequence alone, so that rows do not depend on what else is asked."""

    def __init__(self, path: Path, *, dtype: torch.dtype = torch.float32, layers: Collection[int] = ()) -> None:
        """The outputs of `layers` are a part of every row."""
        self._lm = load_causal_lm(path, dtype, torch.device("cpu"))
        self._layers = chosen_layers(self._lm, layers)
        self._packer = Packer(self._lm, load_image_reader(path))
        self.version = 1

    @torch.no_grad()
    def submit(self, sequences: Sequence[TokenSequence], *, keep: bool = False) -> Rows:
        """Their rows."""
        return Rows(rows_RD=torch.cat([self._rows(each) for each in sequences]), weight_version=self.version)

    def _rows(self, sequence: TokenSequence) -> Tensor:
        packed = self._packer.pack([sequence])
        with captured(self._layers) as outputs:
            hidden_TD = hidden_states_TD(self._lm, packed)
        states_TC = torch.cat([hidden_TD, *(outputs[layer] for layer in self._layers)], 1)
        return states_TC.index_select(0, packed.rows_R)

    def head(self) -> tuple[OutputHead, int]:
        """The head and its version."""
        with torch.no_grad():
            head = output_head(self._lm)
            return OutputHead(
                weight_VD=head.weight_VD.detach(),
                bias_V=None if head.bias_V is None else head.bias_V.detach(),
                logit_scale=head.logit_scale,
                logit_softcap=head.logit_softcap,
            ), self.version


LAYER_WEIGHT = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Of a student and its teacher that are compared."""

    pairs: dict[int, int]
    distance: Literal["cosine", "mse"]
    teacher_width: int

    def distance_from(self, student_width: int) -> LayerDistance:
        """With maps that are the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return LayerDistance(
                self.pairs, distance=self.distance, student_width=student_width, teacher_width=self.teacher_width
            )


def layers_of(told: Mapping[str, Any]) -> Layers:
    """From JSON, in whose objects keys are text."""
    return Layers(**{**told, "pairs": {int(own): theirs for own, theirs in told["pairs"].items()}})


def _beside(student: Student) -> tuple[Algorithm | None, LayerDistance | None]:
    """What has parameters beside the student's, and compares layers."""
    found = [student.algorithm] if not isinstance(student.algorithm, nn.ModuleList) else list(student.algorithm)
    distance = next((part for part in found if isinstance(part, LayerDistance)), None)
    return next((part for part in found if part is not None and part is not distance), None), distance


def random_sequences(count: int, *, seed: int, vocabulary_size: int, longest: int = 40) -> list[TokenSequence]:
    """Sequences of uneven length, each with a random share of its positions."""
    random = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        length = int(random.integers(3, longest + 1))
        num_rows = int(random.integers(1, length))
        positions = np.sort(random.choice(length - 1, size=num_rows, replace=False))
        sequences.append(
            TokenSequence(
                token_ids=random.integers(0, vocabulary_size, length).astype(np.int32),
                positions=positions.astype(np.int32),
            )
        )
    return sequences


def step_batch(
    sequences: Sequence[TokenSequence],
    plan: Sequence[Sequence[int]],
    teacher: RowService | None,
    *,
    step: int = 0,
    context: ContextRows | None = None,
) -> StepBatch:
    """The share of a rank, or of ranks that hold rows of tokens together, whose micro-batches hold the sequences that
    `plan` numbers.
    """
    micro_batches = []
    for members in plan:
        chosen = tuple(sequences[index] for index in members)
        micro_batches.append(
            MicroBatch(sequences=chosen, teacher=None) if teacher is None else asking(chosen, teacher.submit, context)
        )
    return StepBatch(
        step=step,
        micro_batches=tuple(micro_batches),
        num_loss_tokens=sum(sequence.num_rows for sequence in sequences),
        num_tokens=sum(sequence.num_tokens for sequence in sequences),
        loss_weight=math.fsum(sequence.weight * sequence.num_rows for sequence in sequences),
    )


def in_copies(mesh: Mesh, *, shard_ranks: int | None) -> Mesh:
    """The same ranks, so many of which share a copy of the student. Collective."""
    if shard_ranks is None:
        return mesh
    timeout = timedelta(seconds=60)
    return replace(mesh, device_mesh=device_mesh(mesh.device.type, shard_ranks=shard_ranks, timeout=timeout))


def build_student(
    path: Path,
    mesh: Mesh,
    *,
    vocabulary_size: int,
    compute_dtype: torch.dtype,
    lora: LoraConfig | None = None,
    quantization: QuantizationConfig | None = None,
    frozen: Sequence[str] = (),
    dual_space_with: LocalTeacher | None = None,
    checkpointed_every: int | None = None,
    gather: Gather = "auto",
    unit_parameters: int | None = None,
    offloads: bool = False,
    is_compiled: bool = False,
    spreads_head: bool = False,
    is_varlen: bool = False,
    layers: Layers | None = None,
) -> Student:
    """A sharded student with the weights of `path`, and an adapter, or projectors to a teacher, if asked for.

    `quantization` says which matrices it rounds. Parameters that `frozen` names do not learn.
    """
    lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
    adapter = None if lora is None else add_adapter(lm, lora, seed=7)
    if frozen:
        freeze(lm, frozen)
        rest_in_bfloat16(lm)
    algorithm = None
    if dual_space_with is not None:
        teacher_head = dual_space_with.head()[0].sliced(vocabulary_size)
        algorithm = DualSpaceKD(
            Setup(
                student_head=output_head(lm).sliced(vocabulary_size).detached(),
                teacher_heads=lambda: {"": teacher_head},
                shared=None,
                device=torch.device("cpu"),
            )
        )
    if quantization is not None:
        round_modules(lm, quantization, compute_dtype)
    distance = None if layers is None else layers.distance_from(output_head(lm).hidden_size)
    parallel = ParallelConfig(context=1 if mesh.context is None else mesh.context.size)
    student = Student(
        lm,
        vocabulary_size=vocabulary_size,
        adapter=adapter,
        algorithm=trained_beside(algorithm, distance),
        is_varlen=is_varlen,
        context=mesh.context,
        exchange=parallel.exchange(lm.config.num_attention_heads),
        layers=() if layers is None else layers.pairs,
    )
    if is_compiled:
        compile_layers(lm)
    if checkpointed_every is not None:
        checkpoint_activations(lm, every=checkpointed_every)
    head_share = VocabularyShare if spreads_head else None
    shard(
        student,
        mesh.device_mesh,
        compute_dtype=compute_dtype,
        gather=gather,
        unit_parameters=unit_parameters,
        offloads=offloads,
        head_share=head_share,
    )
    return student


def build_stepper(
    student: Student,
    teacher: LocalTeacher,
    mesh: Mesh,
    *,
    config: OptimizerConfig,
    steps: int,
    is_sampled: bool = False,
    kd_weight: float = 1.0,
    ce_weight: float = 0.3,
) -> GradientStepper:
    """A stepper that distils from `teacher` by forward KL, some cross-entropy, the student's algorithm and layers."""
    algorithm, distance = _beside(student)
    objective: Objective = Distillation(
        terms=Terms(
            divergence=forward_kl,
            temperature=1.0,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            with_entropies=is_sampled,
            top_k=8 if is_sampled else 0,
        ),
        algorithm=algorithm or vanilla_kd,
        teacher_head=TeacherHead(teacher, vocabulary_size=student.vocabulary_size, device=mesh.device),
    )
    objective = objective if student.share is None else spread(objective, student.share)
    return GradientStepper(
        student,
        objective if distance is None else WithLayers(objective=objective, distance=distance, weight=LAYER_WEIGHT),
        optimizer_over(student, config, algorithm=student.algorithm, rate_factor=3.0),
        config=config,
        steps=steps,
        mesh=mesh,
    )
