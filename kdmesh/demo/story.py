"""Tells the demo from the corpus to the report, from where an earlier telling ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdmesh.demo import plan as plans
from kdmesh.demo.outcome import Outcome, check_same_start
from kdmesh.demo.plan import Plan
from kdmesh.demo.record import read_record
from kdmesh.demo.stage import Stage, opened
from kdmesh.demo.workspace import METRICS, STUDENTS, is_finished, read_seconds
from kdmesh.launch import jobs

_OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "kd": {"name": "distill", "divergence": {"name": "forward_kl"}},
}
_TITLES = {"sft": "train on the docstrings (SFT)", "kd": "distil the teacher (KD)"}


def tell(plan: Plan, *, output: Path, cache: Path, fresh: bool) -> Outcome:
    """Do what is left to do, and write the report.

    Args:
        output: what this demo makes.
        cache: where the teacher is kept for later demos.
        fresh: forget what this output's students have learnt; the teacher is kept.

    Raises:
        ConfigError: `output` is something else, or the drawing library is missing.
        ChildFailed: a service failed; its log lies in the directory of its run.
        Stopped: a signal came; the next telling continues.
    """
    with opened(plan, output=output, cache=cache, fresh=fresh) as stage:
        stage.train_teacher()
        _train_students(stage)
    return _report(stage)


def _train_students(stage: Stage) -> None:
    """Both against one teacher server, each from the same start."""
    plan, workspace = stage.plan, stage.workspace
    unfinished = [name for name in STUDENTS if not is_finished(workspace.run(name), steps=plan.student_training.steps)]
    overrides: list[str] = []
    if unfinished:
        server = plans.teacher_server(plan, model=workspace.teacher_model)
        overrides = jobs.served(jobs.TEACHER, stage.serve(jobs.TEACHER, server))
    for name in STUDENTS:
        run = workspace.run(name)
        if name in unfinished:
            tree = plans.student_training(
                plan,
                corpus=workspace.corpus,
                start=workspace.student_start,
                output=run,
                objective=_OBJECTIVES[name],
            )
            stage.train(_TITLES[name], workspace.write_config(name, tree), run, overrides)
        stage.seconds[_TITLES[name]] = read_seconds(run)
        last = read_record(run / METRICS).evaluations[-1]
        stage.live.say(
            f"{name.upper()} student ready: [bold]{last.kl_nats_per_token:.4f}[/] nats from its teacher, "
            f"held-out perplexity [bold]{last.perplexity:.1f}[/]"
        )


def _report(stage: Stage) -> Outcome:
    """The figures and the page."""
    from kdmesh.demo.report import write_report  # draws; a second, needed only here

    workspace = stage.workspace
    records = {name: read_record(workspace.run(name) / METRICS) for name in STUDENTS}
    check_same_start(records["sft"], records["kd"])
    outcome = Outcome(
        teacher=read_record(workspace.teacher_run / METRICS),
        sft=records["sft"],
        kd=records["kd"],
        seconds=stage.seconds,
        is_teacher_cached=stage.is_teacher_cached,
        report=workspace.report,
    )
    write_report(outcome, stage.plan, stage.corpus, config=workspace.config("kd"))
    return outcome
