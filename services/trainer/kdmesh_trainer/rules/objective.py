"""What is minimised, and what it needs of the rest."""

from __future__ import annotations

from collections.abc import Iterator

from kdmesh_trainer.sections.algorithm_config import ChunkAlgorithm, DualSpace, VanillaKD
from kdmesh_trainer.sections.job_config import JobSections
from kdmesh_trainer.sections.objective_config import Distill, SampledReverseKL
from kdmesh_trainer.sections.rollouts_config import SamplingConfig
from kdmesh_trainer.sections.source_config import OnPolicy


def broken(cfg: JobSections) -> Iterator[str]:
    """Every broken rule of distillation: its algorithm, divergence and layers."""
    if not isinstance(cfg.objective, Distill):
        return
    yield from _of_algorithm(cfg, cfg.objective)
    yield from _of_layers(cfg)
    if isinstance(cfg.objective.divergence, SampledReverseKL):
        yield from _of_sampled_tokens(cfg, cfg.objective)


def _of_algorithm(cfg: JobSections, objective: Distill) -> Iterator[str]:
    algorithm = objective.algorithm
    if isinstance(algorithm, ChunkAlgorithm) and cfg.data.teacher_tokenizer is None:
        yield f"objective.algorithm {algorithm.name} compares two tokenizers, so it needs data.teacher_tokenizer"
    if cfg.data.has_weights and not isinstance(algorithm, VanillaKD):
        yield f"data.train.weight_column does not go with objective.algorithm {algorithm.name}; it must be vanilla_kd"
    if not isinstance(algorithm, DualSpace):
        return
    if algorithm.token_alignment == "cma" and cfg.data.teacher_tokenizer is None:
        yield "objective.algorithm dskd with token_alignment cma needs data.teacher_tokenizer"
    if cfg.teachers:
        yield "objective.algorithm dskd takes a single `teacher`, not `teachers`"
    if isinstance(objective.divergence, SampledReverseKL):
        yield "objective.algorithm dskd does not go with sampled_reverse_kl, which knows no second space"


def _of_layers(cfg: JobSections) -> Iterator[str]:
    """Those of outputs of layers, which are rows of one teacher beside its final ones."""
    if cfg.layers is None:
        return
    if cfg.data.teacher_tokenizer is not None:
        yield "objective.layers does not go with data.teacher_tokenizer, whose rows are other positions"
    if cfg.teachers:
        yield "objective.layers takes a single `teacher`, not `teachers`"
    if cfg.teacher is not None and cfg.teacher.wire == "fp8":
        yield (
            "objective.layers does not go with teacher.wire fp8, which has one scale for final hidden states and for "
            "outputs of layers, whose sizes differ much"
        )


def _of_sampled_tokens(cfg: JobSections, objective: Distill) -> Iterator[str]:
    """Those by which every token is drawn from the student's own distribution."""
    if not (isinstance(cfg.source, OnPolicy) and cfg.source.sampled_fraction == 1):
        yield "divergence sampled_reverse_kl needs source on_policy and every token of it sampled"
        return
    sampling = cfg.source.sampling
    ends = {"max_new_tokens": sampling.max_new_tokens, "stop_strings": sampling.stop_strings}
    if sampling != SamplingConfig(temperature=sampling.temperature, **ends):
        yield "divergence sampled_reverse_kl needs sampling by temperature alone: tokens drawn from all"
    if objective.temperature != sampling.temperature:
        yield (
            f"divergence sampled_reverse_kl needs objective.temperature ({objective.temperature}) to be "
            f"source.sampling.temperature ({sampling.temperature})"
        )
