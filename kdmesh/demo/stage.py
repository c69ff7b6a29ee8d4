"""What every telling of the demo needs: a corpus, a teacher, servers, training runs, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.markup import escape

from kdmesh import config
from kdmesh.allowance import num_cores
from kdmesh.demo import plan as plans
from kdmesh.demo.corpus import Corpus, build_corpus
from kdmesh.demo.live import Live
from kdmesh.demo.models import train_tokenizer, write_model
from kdmesh.demo.plan import Plan
from kdmesh.demo.record import read_record
from kdmesh.demo.workspace import (
    METRICS,
    Workspace,
    add_seconds,
    clear_students,
    is_finished,
    open_workspace,
    read_seconds,
)
from kdmesh.errors import ConfigError
from kdmesh.launch import jobs, local
from kdmesh.launch.service_log import kept_in
from kdmesh_trainer.config import TrainerConfig


class Stage:
    """Where a telling happens, made by `opened`.

    Attributes:
        seconds: by phase, in order.
    """

    def __init__(
        self, plan: Plan, workspace: Workspace, corpus: Corpus, processes: local.Processes, logs: ExitStack
    ) -> None:
        self.plan = plan
        self.workspace = workspace
        self.corpus = corpus
        self.live = Live()
        self.seconds: dict[str, float] = {}
        self.is_teacher_cached = False
        self._processes = processes
        self._logs = logs

    def train_teacher(self) -> None:
        """From scratch, with this project's own trainer, unless an earlier demo has done it."""
        workspace, training = self.workspace, self.plan.teacher_training
        self.is_teacher_cached = is_finished(workspace.teacher_run, steps=training.steps)
        if not self.is_teacher_cached:
            tree = plans.teacher_training(
                self.plan, corpus=workspace.corpus, start=workspace.teacher_start, output=workspace.teacher_run
            )
            path = workspace.write_config("teacher-training", tree)
            self.train("train the teacher", path, workspace.teacher_run)
        taught = read_record(workspace.teacher_run / METRICS).evaluations[-1]
        note = " (from the cache)" if self.is_teacher_cached else ""
        self.seconds[f"train the teacher{note}"] = read_seconds(workspace.teacher_run)
        self.live.say(f"teacher ready{note}: held-out perplexity [bold]{taught.perplexity:.1f}[/]")

    def serve(self, service: jobs.Service, tree: dict[str, Any]) -> str:
        """Start a server of this configuration; its host:port."""
        path = self.workspace.write_config(service.name, tree)
        with self.timed(f"start the {service.name} server"):
            command = jobs.server_command(
                service,
                path,
                config.load(service.config, path),
                threads=max(1, num_cores() // 2),
                on_line=self._kept(self.workspace.output / f"{service.name}.log"),
            )
            address = jobs.start_server(self._processes, command)
        self.live.say(f"{service.name} server answers on {address}")
        return address

    def train(self, title: str, path: Path, run: Path, overrides: list[str] | None = None) -> None:
        """Train as the configuration in `path` says; `run` is its output."""
        cfg = config.load(TrainerConfig, path, overrides or [])
        assert cfg.steps is not None  # the plan's
        threads = jobs.split_threads(cfg, with_servers=cfg.teacher is not None)
        begin = time.monotonic()
        commands = jobs.rank_commands(
            path,
            overrides or [],
            ranks=jobs.num_ranks(cfg),
            threads=threads.rank,
            on_line=self._kept(run / "trainer.log"),
        )
        try:
            with self.live.following(title, run / METRICS, steps=cfg.steps):
                self._processes.wait(self._processes.start(*commands))
        except local.Stopped:
            self.live.say("stopping after this step, with a checkpoint; the same command continues")
            raise
        finally:
            add_seconds(run, time.monotonic() - begin)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts what happens inside."""
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin

    def _kept(self, log: Path) -> Callable[[str], None]:
        return self._logs.enter_context(kept_in(log, show=lambda line: self.live.say(f"[yellow]{escape(line)}[/]")))


@contextmanager
def opened(plan: Plan, *, output: Path, cache: Path, fresh: bool) -> Iterator[Stage]:
    """A stage with its corpus, tokenizer and two architectures; on exit every process ends.

    Args:
        output: what this demo makes.
        cache: where the teacher is kept for later demos.
        fresh: forget what this output's students have learnt; the teacher is kept.

    Raises:
        ConfigError: `output` is something else, or the drawing library is missing.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("the demo draws with matplotlib: install it with `pip install 'kdmesh[demo]'`")
    # The logs stay open until the last process that writes to them is gone.
    with ExitStack() as logs, local.Processes() as processes:
        begin = time.monotonic()
        corpus = build_corpus(plan.corpus)
        workspace = open_workspace(plan, corpus, output=output, cache=cache)
        if fresh:
            clear_students(workspace)
        corpus.write(workspace.corpus)
        tokenizer = train_tokenizer(corpus, plan.vocabulary_size)
        for path, architecture in (
            (workspace.teacher_start, plan.teacher),
            (workspace.student_start, plan.student),
        ):
            write_model(path, architecture, tokenizer, max_tokens=plan.max_tokens)
        stage = Stage(plan, workspace, corpus, processes, logs)
        stage.seconds["corpus and tokenizer"] = time.monotonic() - begin
        stage.live.say(
            f"{len(corpus.train):,} functions of Python's standard library to learn from, "
            f"{len(corpus.held_out):,} of other modules held out"
        )
        yield stage
