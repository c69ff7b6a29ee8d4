"""Whose answers are trained on, and what drawing, judging and answering them needs."""

from __future__ import annotations

from collections.abc import Iterator

from kdmesh_trainer.sections.algorithm_config import VanillaKD
from kdmesh_trainer.sections.data_config import TextFile
from kdmesh_trainer.sections.job_config import JobSections
from kdmesh_trainer.sections.judge_config import FinishedJudge
from kdmesh_trainer.sections.objective_config import Distill
from kdmesh_trainer.sections.source_config import OnPolicy


def broken(cfg: JobSections) -> Iterator[str]:
    """Every broken rule of the student's own samples."""
    if not isinstance(cfg.source, OnPolicy):
        return
    if not isinstance(cfg.objective, Distill):
        yield "source on_policy needs objective distill: its samples are nothing to imitate"
    elif cfg.objective.imitates_data and cfg.source.sampled_fraction == 1:
        yield (
            f"objective.ce_weight ({cfg.objective.ce_weight}) must be 0 with source on_policy, whose tokens are "
            "the student's own"
        )
    if cfg.data.has_weights and cfg.source.sampled_fraction == 1:
        yield (
            "data.train.weight_column needs source.sampled_fraction below 1 with source on_policy: weights are of "
            "the data's own answers"
        )
    yield from _of_numbers(cfg, cfg.source)
    yield from _of_judge(cfg, cfg.source)
    if cfg.source.environment is not None:
        yield from _of_environment(cfg)


def _of_numbers(cfg: JobSections, source: OnPolicy) -> Iterator[str]:
    """Those of how many samples there are, and how long."""
    sampled = source.prompts_of(cfg.batch.sequences) * source.samples_per_prompt
    if source.sampled_fraction == 1 and sampled != cfg.batch.sequences:
        yield (
            f"batch.sequences ({cfg.batch.sequences}) must be a multiple of source.samples_per_prompt "
            f"({source.samples_per_prompt})"
        )
    if source.sampled_fraction < 1 and not 0 < sampled < cfg.batch.sequences:
        yield (
            f"source.sampled_fraction ({source.sampled_fraction}) makes {sampled} samples of batch.sequences "
            f"({cfg.batch.sequences}) at {source.samples_per_prompt} per prompt; it must leave some of both"
        )
    if source.sampling.max_new_tokens >= cfg.data.max_tokens:
        yield (
            f"source.sampling.max_new_tokens ({source.sampling.max_new_tokens}) must be less than "
            f"data.max_tokens ({cfg.data.max_tokens}), which a prompt takes a part of"
        )


def _of_judge(cfg: JobSections, source: OnPolicy) -> Iterator[str]:
    """Those by which a judge has what it needs, and what it says can be heeded."""
    if source.judge is None:
        return
    if isinstance(cfg.objective, Distill) and not isinstance(cfg.objective.algorithm, VanillaKD):
        yield f"source.judge does not go with objective.algorithm {cfg.objective.algorithm.name}; it must be vanilla_kd"
    if cfg.data.teacher_tokenizer is not None:
        yield "source.judge does not go with data.teacher_tokenizer"
    if cfg.data.token_cache is not None and not isinstance(source.judge, FinishedJudge):
        yield f"data.token_cache does not go with source.judge {source.judge.name}, which needs the rows"


def _of_environment(cfg: JobSections) -> Iterator[str]:
    """Those by which the data can be had in the way that episodes need it."""
    if cfg.data.teacher_tokenizer is not None:
        yield (
            "source.environment does not go with data.teacher_tokenizer, whose template would write the turns otherwise"
        )
    if cfg.data.teacher_context is not None:
        yield "source.environment does not go with data.teacher_context: what is answered follows the student's prompt"
    if cfg.data.token_cache is not None:
        yield "data.token_cache does not go with source.environment, which needs the rows"
    for name, dataset in cfg.data.train_datasets.items():
        if isinstance(dataset, TextFile):
            key = f"data.train.datasets.{name}" if name else "data.train"
            yield f"source.environment needs chats: {key} has format text"
