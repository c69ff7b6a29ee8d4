"""How ranks share the work, and what needs whole sequences or whole heads on each."""

from __future__ import annotations

from collections.abc import Iterator

from kdmesh_trainer.sections.job_config import JobSections
from kdmesh_trainer.sections.objective_config import Distill
from kdmesh_trainer.sections.parallel_config import SPREAD_DIVERGENCES


def broken(cfg: JobSections) -> Iterator[str]:
    """Every broken rule of ranks, context parallelism and a spread head."""
    context, shards = cfg.parallel.context, cfg.parallel.shard_ranks
    # A copy may lie on several machines, each with `ranks`.
    if cfg.ranks is not None and shards is not None and cfg.ranks % shards and shards % cfg.ranks:
        yield f"parallel.shard_ranks ({shards}) must divide ranks ({cfg.ranks}), or be a multiple of it"
    if cfg.ranks is not None and cfg.ranks % context:
        yield f"parallel.context ({context}) must divide ranks ({cfg.ranks})"
    if context > 1:
        for what in _needs_whole_sequences(cfg):
            yield f"parallel.context is {context}, which does not go with {what}; it must be 1"
    if cfg.parallel.head != "whole":
        for what in _needs_a_whole_head(cfg):
            yield f"parallel.head vocabulary does not go with {what}"


def _needs_whole_sequences(cfg: JobSections) -> Iterator[str]:
    if cfg.parallel.head != "whole":
        yield "parallel.head vocabulary"
    if cfg.data.has_weights:
        yield "data.train.weight_column"
    if cfg.student.compile != "none":
        yield "student.compile"
    if cfg.data.teacher_tokenizer is not None:
        yield "data.teacher_tokenizer: what two tokenizers have alike may lie on two ranks"
    if cfg.source.kind == "on_policy" and cfg.source.judge is not None:
        yield "source.judge"


def _needs_a_whole_head(cfg: JobSections) -> Iterator[str]:
    if cfg.student.lora is not None:
        yield "student.lora, whose head does not learn"
    if cfg.teachers:
        yield "`teachers`: it takes a single `teacher`"
    if cfg.parallel.shard_ranks is not None:
        yield "parallel.shard_ranks"
    if cfg.parallel.offload == "all":
        yield "parallel.offload all"
    if cfg.data.teacher_tokenizer is not None:
        yield "data.teacher_tokenizer, whose tokens are others"
    if not isinstance(cfg.objective, Distill):
        return
    if (algorithm := cfg.objective.algorithm.name) != "vanilla_kd":
        yield f"objective.algorithm {algorithm}, but with vanilla_kd"
    if cfg.objective.keep is not None:
        yield "objective.keep, which looks at all tokens of a row"
    if (divergence := cfg.objective.divergence.name) not in SPREAD_DIVERGENCES:
        yield (f"divergence {divergence}, which looks at all tokens of a row, but with {', '.join(SPREAD_DIVERGENCES)}")
