"""Tells the demo from the corpus to the report, from where an earlier telling ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.markup import escape

from kdmesh import config, jobs, local
from kdmesh.demo import plan as plans
from kdmesh.demo.corpus import Corpus, build_corpus
from kdmesh.demo.live import Live
from kdmesh.demo.models import train_tokenizer, write_model
from kdmesh.demo.outcome import Outcome, check_same_start
from kdmesh.demo.plan import Plan
from kdmesh.demo.record import read_record
from kdmesh.demo.workspace import (
    METRICS,
    STUDENTS,
    Workspace,
    add_seconds,
    clear_students,
    is_finished,
    open_workspace,
    read_seconds,
)
from kdmesh.errors import ConfigError
from kdmesh_teacher.config import TeacherConfig
from kdmesh_trainer.config import TrainerConfig

_OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "kd": {"name": "distill", "divergence": {"name": "forward_kl"}},
}
_TITLES = {"teacher": "train the teacher", "sft": "train on the docstrings (SFT)", "kd": "distil the teacher (KD)"}


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
    if find_spec("matplotlib") is None:
        raise ConfigError("the demo draws with matplotlib: install it with `pip install 'kdmesh[demo]'`")
    # The logs stay open until the last process that writes to them is gone.
    with ExitStack() as logs, local.Processes() as processes:
        telling = _Telling(plan, processes, logs, Live())
        telling.prepare(output, cache, fresh=fresh)
        telling.train_teacher()
        telling.train_students()
    return telling.report()


class _Telling:
    """The steps of the story, in order."""

    def __init__(self, plan: Plan, processes: local.Processes, logs: ExitStack, live: Live) -> None:
        self._plan = plan
        self._processes = processes
        self._logs = logs
        self._live = live
        self._seconds: dict[str, float] = {}
        self._corpus: Corpus
        self._workspace: Workspace

    def prepare(self, output: Path, cache: Path, *, fresh: bool) -> None:
        """Corpus, tokenizer and the two architectures."""
        with self._timed("corpus and tokenizer"):
            self._corpus = build_corpus(self._plan.corpus)
            self._workspace = open_workspace(self._plan, self._corpus, output=output, cache=cache)
            if fresh:
                clear_students(self._workspace)
            self._corpus.write(self._workspace.corpus)
            tokenizer = train_tokenizer(self._corpus, self._plan.vocabulary_size)
            for path, architecture in (
                (self._workspace.teacher_start, self._plan.teacher),
                (self._workspace.student_start, self._plan.student),
            ):
                write_model(path, architecture, tokenizer, max_tokens=self._plan.max_tokens)
        self._live.say(
            f"{len(self._corpus.train):,} functions of Python's standard library to learn from, "
            f"{len(self._corpus.held_out):,} of other modules held out"
        )

    def train_teacher(self) -> None:
        """From scratch, with this project's own trainer, unless an earlier demo has done it."""
        workspace, training = self._workspace, self._plan.teacher_training
        self._is_teacher_cached = is_finished(workspace.teacher_run, steps=training.steps)
        if not self._is_teacher_cached:
            tree = plans.teacher_training(
                self._plan, corpus=workspace.corpus, start=workspace.teacher_start, output=workspace.teacher_run
            )
            self._train("teacher", workspace.write_config("teacher-training", tree), workspace.teacher_run)
        taught = read_record(workspace.teacher_run / METRICS).evaluations[-1]
        note = " (from the cache)" if self._is_teacher_cached else ""
        self._seconds[f"teacher{note}"] = read_seconds(workspace.teacher_run)
        self._live.say(f"teacher ready{note}: held-out perplexity [bold]{taught.perplexity:.1f}[/]")

    def train_students(self) -> None:
        """Both against one teacher server, each from the same start."""
        workspace, steps = self._workspace, self._plan.student_training.steps
        unfinished = [name for name in STUDENTS if not is_finished(workspace.run(name), steps=steps)]
        served = self._serve() if unfinished else []
        for name in STUDENTS:
            run = workspace.run(name)
            if name in unfinished:
                tree = plans.student_training(
                    self._plan,
                    corpus=workspace.corpus,
                    start=workspace.student_start,
                    output=run,
                    objective=_OBJECTIVES[name],
                )
                self._train(name, workspace.write_config(name, tree), run, served)
            self._seconds[_TITLES[name]] = read_seconds(run)
            last = read_record(run / METRICS).evaluations[-1]
            self._live.say(
                f"{name.upper()} student ready: [bold]{last.kl_nats_per_token:.4f}[/] nats from its teacher, "
                f"held-out perplexity [bold]{last.perplexity:.1f}[/]"
            )

    def report(self) -> Outcome:
        """The figures and the page."""
        from kdmesh.demo.report import write_report  # draws; a second, needed only here

        workspace = self._workspace
        records = {name: read_record(workspace.run(name) / METRICS) for name in STUDENTS}
        check_same_start(records["sft"], records["kd"])
        outcome = Outcome(
            teacher=read_record(workspace.teacher_run / METRICS),
            sft=records["sft"],
            kd=records["kd"],
            seconds=self._seconds,
            is_teacher_cached=self._is_teacher_cached,
            report=workspace.report,
        )
        write_report(outcome, self._plan, self._corpus, config=workspace.config("kd"))
        return outcome

    def _serve(self) -> list[str]:
        """Start the teacher server; the overrides that name it."""
        workspace = self._workspace
        path = workspace.write_config("teacher", plans.teacher_server(self._plan, model=workspace.teacher_model))
        log = self._logs.enter_context((workspace.output / "teacher.log").open("a", buffering=1, encoding="utf-8"))
        with self._timed("start the teacher server"):
            address = jobs.serve_teacher(
                self._processes,
                jobs.teacher_command(
                    path,
                    config.load(TeacherConfig, path),
                    threads=max(1, local.num_cores() // 2),
                    on_line=jobs.kept(log.write, show=self._show),
                ),
            )
        self._live.say(f"teacher server answers on {address}")
        return jobs.served(address)

    def _train(self, name: str, path: Path, run: Path, overrides: list[str] | None = None) -> None:
        cfg = config.load(TrainerConfig, path, overrides or [])
        threads = jobs.split_threads(cfg, with_teacher=cfg.teacher is not None)
        run.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        log = self._logs.enter_context((run / "trainer.log").open("a", buffering=1, encoding="utf-8"))
        commands = jobs.rank_commands(
            path,
            overrides or [],
            ranks=jobs.num_ranks(cfg),
            threads=threads.rank,
            on_line=jobs.kept(log.write, show=self._show),
        )
        try:
            with self._live.following(_TITLES[name], run / METRICS, steps=cfg.steps):
                self._processes.wait(self._processes.start(*commands))
        except local.Stopped:
            self._live.say("stopping after this step, with a checkpoint; the same command continues")
            raise
        finally:
            add_seconds(run, time.monotonic() - begin)

    def _show(self, line: str) -> None:
        self._live.say(f"[yellow]{escape(line)}[/]")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - begin


def print_table(outcome: Outcome) -> None:
    """The result for a person, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="On held-out functions", title_justify="left", title_style="bold")
    for heading in ("model", "KL(teacher ‖ model)", "perplexity", "same first choice"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    table.add_row("teacher", "", f"{outcome.teacher.evaluations[-1].perplexity:,.1f}", "")
    for name, evaluation in outcome.rows:
        style = "bold" if name == "KD" else None
        kl, agreement = evaluation.kl_nats_per_token, evaluation.top1_agreement
        assert kl is not None
        assert agreement is not None
        table.add_row(name, f"{kl:.4f}", f"{evaluation.perplexity:,.1f}", f"{agreement:.1%}", style=style)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print()
    console.print(table)
    console.print(outcome.sentence())
    console.print(f"Report: {outcome.report}")
