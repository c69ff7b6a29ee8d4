"""How long a run is, and when it is judged."""

from __future__ import annotations

from collections.abc import Iterator

from kdmesh_trainer.sections.job_config import JobSections

_MOST_STEPS = 99_999_999  # names of checkpoints have eight digits


def broken(cfg: JobSections) -> Iterator[str]:
    """Every broken rule of steps, epochs, evaluations and questions."""
    if cfg.steps is None and cfg.epochs is None:
        yield "how long is the run? give steps or epochs"
    if cfg.steps is not None and cfg.epochs is not None:
        yield f"give steps ({cfg.steps}) or epochs ({cfg.epochs:g}), not both; null leaves one out"
    elif cfg.steps is not None and (why := unfit_length(cfg, cfg.steps)) is not None:
        yield why
    yield from _of_evaluations(cfg)
    yield from _of_questions(cfg)


def unfit_length(cfg: JobSections, steps: int) -> str | None:
    """Why a run cannot have so few steps, or so many; None: it can."""
    if steps > _MOST_STEPS:
        return f"steps ({steps}) must be no more than {_MOST_STEPS}"
    if (why := cfg.optimizer.too_short(steps)) is not None:
        return why
    if cfg.profile is not None and (step := max(cfg.profile.steps)) >= steps:
        return f"profile.steps has {step}; steps are counted from 0, and the last is {steps - 1}"
    return None


def _of_evaluations(cfg: JobSections) -> Iterator[str]:
    asked = cfg.evaluation
    if asked.every is not None and cfg.data.held_out is None and asked.questions is None:
        yield (
            f"evaluation.every ({asked.every}) has nothing to judge by: give data.held_out or evaluation.questions, "
            "or leave it out"
        )
    if asked.max_sequences is not None and cfg.data.held_out is None:
        yield f"evaluation.max_sequences ({asked.max_sequences}) needs data.held_out, which it bounds"


def _of_questions(cfg: JobSections) -> Iterator[str]:
    """Those of which rollout servers answer the questions."""
    asked, is_sampled = cfg.evaluation, cfg.source.kind == "on_policy"
    if asked.questions is None:
        if asked.rollouts is not None:
            yield "evaluation.rollouts needs evaluation.questions: nobody else asks these, as source is not on_policy"
    elif is_sampled and asked.rollouts is not None:
        yield "there are evaluation.rollouts and source.rollouts; an on-policy run's questions go to source.rollouts"
    elif not is_sampled and asked.rollouts is None:
        yield "evaluation.questions needs evaluation.rollouts: rollout servers that answer them"
