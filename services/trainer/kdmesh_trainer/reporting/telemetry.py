"""Tells people, files and trackers how a run goes."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdmesh.log import can_redraw
from kdmesh.tracing.spans import span
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.questions.scores import AnswerScores
from kdmesh_trainer.reporting.metrics import Metrics
from kdmesh_trainer.reporting.metrics_server import MetricsServer, serving
from kdmesh_trainer.reporting.progress import LogProgress, Progress, Reading, TerminalProgress
from kdmesh_trainer.reporting.trackers import Tracker, build_trackers
from kdmesh_trainer.saving.files import append_line, keep_lines
from kdmesh_trainer.stats import Scores, StepStats

log = logging.getLogger(__name__)

_RECENT_STEPS = 10
_STEP_PHASES = ("batch", "update", "publish")
_GROUPS = {"evaluation": "held_out", "questions": "questions"}
_NO_FIGURES = ("kind", "step", "time", "evaluate_s", "examine_s")
_WHEN_ALL_IS_DONE = "raise `steps`, or `epochs`, to train on, or give another `output` to begin anew"
_SHORTEST_WAIT_S = 1e-3  # a shorter one says nothing of how fast the other side is


@contextmanager
def open_telemetry(
    cfg: TrainerConfig,
    *,
    rank: int,
    doors: Callable[[], Mapping[str, str]],
    imbalance: Callable[[], float | None],
) -> Iterator[RunTelemetry | SilentTelemetry]:
    """What the loop reports to: on rank 0 files, people, trackers and Prometheus; elsewhere nothing.

    Args:
        doors: through which rows come now, and why through these; empty without a teacher.
        imbalance: the most over the mean of the tokens that this rank sent to each teacher lately; None with fewer than
            two.

    Raises:
        ConfigError: a tracker is not installed, or the port of the metrics is not to be had.
    """
    if rank != 0:
        yield SilentTelemetry()
        return
    progress: Progress = TerminalProgress() if can_redraw(sys.stderr) else LogProgress(every_s=10.0)
    metrics = Metrics(cfg.job_name, steps=cfg.steps)
    with ExitStack() as stack:
        server = None if cfg.metrics is None else stack.enter_context(serving(cfg.metrics, metrics.registry))
        telemetry = RunTelemetry(
            record=cfg.output / "metrics.jsonl",
            progress=progress,
            trackers=build_trackers(cfg),
            metrics=metrics,
            metrics_server=server,
            doors=doors,
            imbalance=imbalance,
        )
        has_failed = True
        try:
            yield telemetry
            has_failed = False
        finally:
            telemetry.close(has_failed=has_failed)


class SilentTelemetry:
    """Says nothing."""

    def start(self, first_step: int, steps: int, *, is_judged: bool = True) -> None:
        """Nothing."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Nothing but a span around what happens inside."""
        return span(name)

    def report(self, step: int, stats: StepStats) -> None:
        """Nothing."""

    def report_scores(self, step: int, scores: Scores) -> None:
        """Nothing."""

    def report_answers(self, step: int, scores: AnswerScores) -> None:
        """Nothing."""

    def report_not_finite(self) -> None:
        """Nothing."""


class RunTelemetry:
    """The record of a run: one line per step and evaluation in metrics.jsonl, the same to trackers, a digest to people.

    A line is {"kind": "step" | "evaluation" | "questions", "step": ..., "time": Unix seconds, ...}. Steps count from 0;
    that of the other two is the number of steps done before it. A figure that is not finite is written as null.
    """

    def __init__(
        self,
        *,
        record: Path,
        progress: Progress,
        trackers: list[Tracker],
        metrics: Metrics,
        metrics_server: MetricsServer | None,
        doors: Callable[[], Mapping[str, str]],
        imbalance: Callable[[], float | None],
    ) -> None:
        self._path = record
        self._metrics = metrics
        self._metrics_server = metrics_server
        self._progress = progress
        self._trackers = trackers
        self._doors = doors
        self._imbalance = imbalance
        self._phase_s: dict[str, float] = {}
        self._recent: deque[tuple[StepStats, float]] = deque(maxlen=_RECENT_STEPS)
        self._totals = _Totals()

    def start(self, first_step: int, steps: int, *, is_judged: bool = True) -> None:
        """What an earlier attempt wrote from `first_step` on is dropped, but for a judgement that is not made again.

        That is of the student before the step: the last of a run whose `steps` were fewer.
        """

        def stays(line: Mapping[str, Any]) -> bool:
            is_last = line["step"] == first_step and line["kind"] != "step" and not is_judged
            return is_last or line["step"] < first_step

        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = keep_lines(self._path, stays)
        for tracker in self._trackers:
            tracker.start(first_step)
        for line in kept:
            if line["step"] == first_step:  # which trackers take for superseded
                figures = {name: value for name, value in line.items() if name not in _NO_FIGURES}
                self._track(_GROUPS[line["kind"]], first_step, figures)
        if first_step == steps:
            log.info("all steps were done before", extra={"steps": steps, "next": _WHEN_ALL_IS_DONE})
        self._metrics.started(first_step, steps)
        self._progress.start(first_step, steps)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what happens inside."""
        self._progress.phase(name)
        begin = time.perf_counter()
        try:
            with span(name):
                yield
        finally:
            self._phase_s[name] = self._phase_s.get(name, 0.0) + time.perf_counter() - begin

    def report(self, step: int, stats: StepStats) -> None:
        """Write the step's line and show it."""
        phase_s, self._phase_s = self._phase_s, {}
        step_s = sum(phase_s.get(name, 0.0) for name in _STEP_PHASES)
        self._recent.append((stats, step_s))
        self._totals.add(stats, step_s)
        figures = {
            **stats.figures(),
            "step_s": step_s,
            "tokens_per_second": stats.num_tokens / step_s if step_s else None,
            "teacher_wait_fraction": stats.teacher_wait_s / step_s if step_s else None,
            **{
                f"teacher_wait_fraction.{name}": teacher.wait_s / step_s if step_s else None
                for name, teacher in stats.teachers.items()
            },
        }
        if (imbalance := self._imbalance()) is not None:
            figures["teacher_imbalance"] = imbalance
        seconds = _seconds(stats, phase_s)
        self._metrics.step_done(step + 1, stats, phase_s=phase_s, bound_s=seconds, step_s=step_s)
        self._metrics.rows_came(self._doors().keys(), imbalance)
        bounded_by = max(seconds, key=lambda name: seconds[name])
        facts = {"phase_tokens_per_second": _rates(stats, seconds), "bounded_by": bounded_by}
        self._write("step", step, {**figures, **facts, "phase_s": phase_s, **self._door()})
        self._track("train", step, figures)
        self._progress.show(self._reading(step + 1, stats, bounded_by))

    def report_scores(self, step: int, scores: Scores) -> None:
        """Write the evaluation's line and say it."""
        seconds = self._phase_s.pop("evaluate", 0.0)
        figures = scores.figures()
        self._totals.scores = _known(replace(scores, datasets={}).figures())
        self._write("evaluation", step, {**figures, "evaluate_s": seconds})
        self._track(_GROUPS["evaluation"], step, figures)
        self._metrics.evaluated(scores, seconds)
        log.info("held-out data evaluated", extra={"step": step, **self._totals.scores})
        for name, each in scores.datasets.items():
            log.info("held-out data evaluated", extra={"step": step, "dataset": name, **_known(each.figures())})

    def report_answers(self, step: int, scores: AnswerScores) -> None:
        """Write the line of the questions and say it."""
        seconds = self._phase_s.pop("examine", 0.0)
        figures = scores.figures()
        self._totals.answers = {"accuracy": scores.accuracy.mean} | {
            f"pass_at_{k}": each.mean for k, each in scores.pass_at.items()
        }
        self._write("questions", step, {**figures, "examine_s": seconds})
        self._track(_GROUPS["questions"], step, figures)
        self._metrics.examined(scores, seconds)
        log.info("questions answered", extra={"step": step, **_known(figures)})

    def report_not_finite(self) -> None:
        """The run ends because a loss is not finite; wait until Prometheus knows."""
        self._metrics.not_finite()
        if self._metrics_server is not None:
            self._metrics_server.await_reading()

    def close(self, *, has_failed: bool = False) -> None:
        """End the display, say the summary, and give up trackers: each of them, also when another cannot write."""
        with ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close, has_failed=has_failed)
            self._progress.close()
            if self._totals.num_steps:
                reasons = dict(self._doors())
                log.info("run ended", extra={**self._totals.summary(), **self._door(), "door_reasons": reasons})

    def _door(self) -> dict[str, str | None]:
        return {"door": "+".join(sorted(self._doors())) or None}

    def _reading(self, done: int, stats: StepStats, bounded_by: str) -> Reading:
        seconds = sum(step_s for _, step_s in self._recent)
        rollouts = [recent.rollouts for recent, _ in self._recent if recent.rollouts is not None]
        sampling_wait_s = sum(recent.sampling_wait_s for recent in rollouts)
        return Reading(
            done=done,
            loss_nats_per_token=self._totals.loss_nats_per_token,
            tokens_per_second=sum(recent.num_tokens for recent, _ in self._recent) / seconds if seconds else 0.0,
            teacher_wait_fraction=sum(recent.teacher_wait_s for recent, _ in self._recent) / seconds if seconds else 0,
            sampling_wait_fraction=sampling_wait_s / seconds if rollouts and seconds else None,
            response_tokens_mean=stats.rollouts.response_tokens_mean if stats.rollouts else None,
            bounded_by=bounded_by,
        )

    def _write(self, kind: str, step: int, figures: Mapping[str, Any]) -> None:
        line = {"kind": kind, "step": step, "time": time.time(), **figures}
        append_line(self._path, {name: _or_null(value) for name, value in line.items()})

    def _track(self, group: str, step: int, figures: Mapping[str, float | None]) -> None:
        finite = {f"{group}/{name}": value for name, value in figures.items() if _or_null(value) is not None}
        for tracker in self._trackers:
            tracker.log(step, {name: value for name, value in finite.items() if value is not None})


class _Totals:
    """Sums over the steps of this process."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_tokens = 0
        self.seconds = 0.0
        self.teacher_wait_s = 0.0
        self.num_skipped = 0
        self.loss_nats_per_token = math.nan  # of the last one that had one
        self.scores: dict[str, float] = {}
        self.answers: dict[str, float] = {}

    def add(self, stats: StepStats, step_s: float) -> None:
        self.num_steps += 1
        self.num_tokens += stats.num_tokens
        self.seconds += step_s
        self.teacher_wait_s += stats.teacher_wait_s
        if stats.loss_nats_per_token is None:
            self.num_skipped += 1
        else:
            self.loss_nats_per_token = stats.loss_nats_per_token

    def summary(self) -> dict[str, float]:
        return {
            "steps": self.num_steps,
            "tokens": self.num_tokens,
            "seconds_in_steps": round(self.seconds, 1),
            "tokens_per_second": round(self.num_tokens / self.seconds, 1) if self.seconds else 0.0,
            "teacher_wait_fraction": round(self.teacher_wait_s / self.seconds, 4) if self.seconds else 0.0,
            "loss_nats_per_token": self.loss_nats_per_token,
            **({"skipped_steps": self.num_skipped} if self.num_skipped else {}),
            **{f"held_out_{name}": value for name, value in self.scores.items()},
            **{f"questions_{name}": value for name, value in self.answers.items()},
        }


def _seconds(stats: StepStats, phase_s: Mapping[str, float]) -> dict[str, float]:
    """Where a step's time went: waiting for samples, waiting for the teacher, the update itself, publishing it."""
    seconds = {"teacher": stats.teacher_wait_s, "update": phase_s.get("update", 0.0) - stats.teacher_wait_s}
    if stats.rollouts is not None:
        seconds = {"sampling": stats.rollouts.sampling_wait_s, **seconds, "publish": phase_s.get("publish", 0.0)}
    return seconds


def _rates(stats: StepStats, seconds: Mapping[str, float]) -> dict[str, float | None]:
    """Tokens per second of each phase that works on tokens; None where that took no time.

    Samples by the time that it took to draw them, rows by the time that they were waited for.
    """
    tokens = {"teacher": stats.num_tokens, "update": stats.num_tokens}
    if stats.rollouts is not None:
        tokens = {"sampling": stats.rollouts.response_tokens, **tokens}
        seconds = {**seconds, "sampling": stats.rollouts.sampling_s}
    return {
        name: number / seconds[name] if seconds[name] > _SHORTEST_WAIT_S else None for name, number in tokens.items()
    }


def _known(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
