"""What is written of a run, and where it is shown."""

from __future__ import annotations

from collections.abc import Iterator

from kdmesh import job_names
from kdmesh_trainer.sections.job_config import JobSections


def broken(cfg: JobSections) -> Iterator[str]:
    """Every broken rule of the output, exports and trackers."""
    if problem := job_names.problem_of(cfg.job_name):
        yield f"output ends in the job's name: {problem}"
    if len(set(cfg.trackers)) < len(cfg.trackers):
        yield f"trackers names one twice: {', '.join(cfg.trackers)}"
    if cfg.export.matrices != "rounded" and cfg.student.quantization is None:
        yield f"export.matrices {cfg.export.matrices} needs student.quantization"
    best = cfg.export.best
    if best == "accuracy" and cfg.evaluation.questions is None:
        yield "export.best accuracy needs evaluation.questions"
    if best in ("kl_nats_per_token", "cross_entropy_nats_per_token") and cfg.data.held_out is None:
        yield f"export.best {best} needs data.held_out"
    if best == "kl_nats_per_token" and not cfg.all_teachers:
        yield "export.best kl_nats_per_token needs a `teacher`"
