"""Tells how a student learns from its own answers: teacher, rollout server and trainer on this machine."""

from __future__ import annotations

from pathlib import Path

from kdmesh.demo import plan as plans
from kdmesh.demo.outcome import OnPolicyOutcome
from kdmesh.demo.plan import Plan
from kdmesh.demo.record import read_record, read_sampled
from kdmesh.demo.stage import Stage, opened
from kdmesh.demo.workspace import METRICS, ON_POLICY, WARM_UP, is_finished, read_seconds
from kdmesh.launch import jobs


def tell(plan: Plan, *, output: Path, cache: Path, fresh: bool) -> OnPolicyOutcome:
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
        warm_up(stage)
        _learn_from_samples(stage)
    return _report(stage)


def warm_up(stage: Stage) -> None:
    """A student whose samples are something: a random one would only babble."""
    plan, workspace, title = stage.plan, stage.workspace, "warm up on the docstrings"
    run = workspace.run(WARM_UP)
    if not is_finished(run, steps=plan.student_warm_up.steps):
        tree = plans.warm_up(plan, corpus=workspace.corpus, start=workspace.student_start, output=run)
        stage.train(title, workspace.write_config(WARM_UP, tree), run)
    stage.seconds[title] = read_seconds(run)
    last = read_record(run / METRICS).evaluations[-1]
    stage.live.say(f"student warmed up: held-out perplexity [bold]{last.perplexity:.1f}[/]")


def _learn_from_samples(stage: Stage) -> None:
    plan, workspace, title = stage.plan, stage.workspace, "learn from its own answers"
    run, start = workspace.run(ON_POLICY), workspace.run(WARM_UP) / "final"
    if not is_finished(run, steps=plan.student_on_policy.training.steps):
        teacher = stage.serve(jobs.TEACHER, plans.teacher_server(plan, model=workspace.teacher_model))
        rollout = stage.serve(jobs.ROLLOUT, plans.rollout_server(plan, model=start))
        tree = plans.on_policy(plan, corpus=workspace.corpus, start=start, output=run)
        overrides = [*jobs.served(jobs.TEACHER, teacher), *jobs.served(jobs.ROLLOUT, rollout)]
        stage.train(title, workspace.write_config(ON_POLICY, tree), run, overrides)
    stage.seconds[title] = read_seconds(run)
    last = read_record(run / METRICS).evaluations[-1]
    stage.live.say(
        f"student ready: [bold]{last.kl_nats_per_token:.4f}[/] nats from its teacher, "
        f"held-out perplexity [bold]{last.perplexity:.1f}[/]"
    )


def _report(stage: Stage) -> OnPolicyOutcome:
    """The figures and the page."""
    from kdmesh.demo.on_policy_report import write_report  # draws; a second, needed only here

    workspace = stage.workspace
    metrics = workspace.run(ON_POLICY) / METRICS
    outcome = OnPolicyOutcome(
        teacher=read_record(workspace.teacher_run / METRICS),
        run=read_record(metrics),
        sampled=read_sampled(metrics),
        seconds=stage.seconds,
        is_teacher_cached=stage.is_teacher_cached,
        report=workspace.report,
    )
    write_report(outcome, stage.plan, stage.corpus, config=workspace.config(ON_POLICY))
    return outcome
