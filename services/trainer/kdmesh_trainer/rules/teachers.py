"""Who teaches what, and in which tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kdmesh_trainer.sections.job_config import JobSections
from kdmesh_trainer.sections.objective_config import Distill


def broken(cfg: JobSections) -> Iterator[str]:
    """Every broken rule of the teacher, of several, and of its tokenizer and context."""
    is_distilled = isinstance(cfg.objective, Distill)
    if is_distilled and not cfg.all_teachers:
        yield "objective distill needs a `teacher` section, or `teachers`"
    if cfg.teacher_update_every is not None and not is_distilled:
        yield "teacher.follows_student needs objective distill: nobody else learns from the teacher"
    if cfg.data.teacher_context is not None and not is_distilled:
        yield "data.teacher_context needs objective distill: nobody else learns from the teacher"
    yield from _of_several(cfg) if cfg.teachers else _of_one(cfg)
    if cfg.data.teacher_tokenizer is not None:
        yield from _of_two_tokenizers(cfg)


def _of_one(cfg: JobSections) -> Iterator[str]:
    weights = cfg.objective.teacher_weights if isinstance(cfg.objective, Distill) else None
    asked = {"data.teacher_column": cfg.data.teacher_column, "objective.teacher_weights": weights}
    for key, value in asked.items():
        if value is not None:
            yield f"{key} needs `teachers`: a mapping of names to what `teacher` takes"


def _of_several(cfg: JobSections) -> Iterator[str]:
    if cfg.teacher is not None:
        yield "there are `teacher` and `teachers`; give one of them"
    if not isinstance(cfg.objective, Distill):
        yield "`teachers` needs objective distill; for sft a single `teacher` serves evaluation"
        return
    if cfg.source.kind == "on_policy" and cfg.source.colocated:
        yield "source.colocated takes a single `teacher`, not `teachers`"
    column, weights = cfg.data.teacher_column, cfg.objective.teacher_weights
    if column is not None and weights is not None:
        yield "there are data.teacher_column and objective.teacher_weights; a row has one teacher or all"
    if column is None and weights is None and len(cfg.teachers) > 1:
        yield (
            f"there are {len(cfg.teachers)} teachers: data.teacher_column must name the column that says which one "
            "each row has, or objective.teacher_weights must mix them"
        )
    if weights is not None and weights.keys() != cfg.teachers.keys():
        yield (
            f"objective.teacher_weights names {_listed(weights)}, and `teachers` {_listed(cfg.teachers)}; they must be "
            "the same"
        )
    for name, teacher in cfg.teachers.items():
        if teacher.follows_student is not None:
            yield f"teachers.{name}.follows_student: only a single `teacher` can follow the student"
    ahead = {name: teacher.prefetch for name, teacher in cfg.teachers.items()}
    if len(set(ahead.values())) > 1:
        yield f"teachers have different prefetch ({ahead}); a micro-batch is asked of all of them at once"


def _of_two_tokenizers(cfg: JobSections) -> Iterator[str]:
    if cfg.teacher is None:
        yield "data.teacher_tokenizer needs one `teacher`"
    elif cfg.teacher.follows_student is not None:
        yield "data.teacher_tokenizer does not go with teacher.follows_student, which has the student's"
    if cfg.source.kind == "on_policy" and cfg.data.token_cache is not None:
        yield "data.token_cache does not go with data.teacher_tokenizer and source on_policy, which need the text"
    if isinstance(cfg.objective, Distill) and cfg.objective.divergence.name == "sampled_reverse_kl":
        yield "divergence sampled_reverse_kl does not go with data.teacher_tokenizer, whose tokens differ"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
