"""Builds what the student is trained to minimise, and what trains it."""

from __future__ import annotations

from functools import partial
from typing import assert_never

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from kdmesh.losses import (
    Divergence,
    SampledDivergence,
    VocabularyShare,
    build_divergence,
    custom_divergence,
    truncated,
)
from kdmesh.models.head import output_head
from kdmesh_trainer.algorithms.build import BuildAlgorithm, rate_factor
from kdmesh_trainer.algorithms.layer_distance import LayerDistance
from kdmesh_trainer.algorithms.seam import Algorithm, Setup, Terms
from kdmesh_trainer.builders.teachers import Teachers
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.encoding.tokenizer import TeacherTokens
from kdmesh_trainer.objectives.layered import WithLayers
from kdmesh_trainer.objectives.objective import CrossEntropy, Distillation, Objective
from kdmesh_trainer.objectives.spread import spread
from kdmesh_trainer.optimization.optimizer import optimizer_over
from kdmesh_trainer.sections.objective_config import CustomDivergence, Distill, Sft
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.student.model import Student


def resolve_divergence(cfg: Distill) -> Divergence | SampledDivergence:
    """The divergence `cfg` names, with its own parameters bound and no others. Raises ConfigError."""
    if isinstance(cfg.divergence, CustomDivergence):
        divergence: Divergence | SampledDivergence = custom_divergence(cfg.divergence.target, cfg.divergence.params)
    else:
        divergence = build_divergence(cfg.divergence.name, cfg.divergence.model_dump(exclude={"name"}))
    if cfg.keep is None or isinstance(divergence, SampledDivergence):
        return divergence
    return truncated(divergence, top_k=cfg.keep.top_k, top_p=cfg.keep.top_p)


def build_algorithm(
    build: BuildAlgorithm | None,
    lm: PreTrainedModel,
    teachers: Teachers | None,
    *,
    vocabulary_size: int,
    tokens: TeacherTokens,
    device: torch.device,
    seed: int,
) -> Algorithm | None:
    """Before the student, which one with parameters becomes a part of, is sharded. None: the objective has none.

    Args:
        vocabulary_size: real tokens of the student's head to use.
    """
    if build is None:
        return None
    assert teachers is not None
    torch.manual_seed(seed)  # its first values must be the same on every rank
    student_head = output_head(lm).sliced(vocabulary_size).detached()
    return build(
        Setup(
            student_head=student_head,
            teacher_heads=partial(teachers.first_heads, student_head),
            shared=tokens.shared,
            boundaries=tokens.boundaries,
            device=device,
        )
    )


def build_optimizer(cfg: TrainerConfig, student: Student) -> Optimizer:
    """Over the sharded student, with an algorithm's own parameters."""
    factor = rate_factor(cfg.objective.algorithm) if isinstance(cfg.objective, Distill) else 1.0
    return optimizer_over(student, cfg.optimizer, algorithm=student.algorithm, rate_factor=factor)


def build_objective(
    cfg: TrainerConfig,
    divergence: Divergence | SampledDivergence | None,
    algorithm: Algorithm | None,
    teachers: Teachers | None,
    share: VocabularyShare | None,
    distance: LayerDistance | None,
) -> Objective:
    """What is minimised; `divergence`, `algorithm` and `teachers` are None where `cfg.objective` has none.

    Args:
        share: of the student's head; None: it is whole.
        distance: of layers; None: none are compared.
    """
    objective = _with_whole_heads(cfg, divergence, algorithm, teachers)
    objective = objective if share is None else spread(objective, share)
    if distance is None:
        return objective
    assert cfg.layers is not None
    return WithLayers(objective=objective, distance=distance, weight=cfg.layers.weight)


def _with_whole_heads(
    cfg: TrainerConfig,
    divergence: Divergence | SampledDivergence | None,
    algorithm: Algorithm | None,
    teachers: Teachers | None,
) -> Objective:
    match cfg.objective:
        case Distill():
            assert divergence is not None and algorithm is not None and teachers is not None
            return Distillation(
                terms=Terms(
                    divergence=divergence,
                    **cfg.objective.numbers_at(0),
                    imitates_data=cfg.objective.imitates_data,
                    with_entropies=isinstance(cfg.source, OnPolicy),
                    top_k=cfg.source.overlap_tokens if isinstance(cfg.source, OnPolicy) else 0,
                ),
                teacher_head=teachers.heads,
                algorithm=algorithm,
                numbers_at=cfg.objective.numbers_at,
            )
        case Sft():
            return CrossEntropy()
        case _:
            assert_never(cfg.objective)
