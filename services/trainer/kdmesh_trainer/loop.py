"""The training loop."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from kdmesh.tracing.spans import span
from kdmesh_trainer.questions.scores import AnswerScores
from kdmesh_trainer.sources.batches import Source, StepBatch
from kdmesh_trainer.stats import Scores, StepStats
from kdmesh_trainer.stop import NEVER, StepLost, Stopping


class Stepper(Protocol):
    """Turns a batch into an update of the student."""

    def update(self, batch: StepBatch) -> StepStats:
        """One optimizer step. Collective. Raises StepLost where it cannot be done, and then has changed nothing."""
        ...


class Publisher(Protocol):
    """Keeps a copy of the student that somebody else uses while it learns."""

    def publish(self, *, version: int) -> None:
        """Have it be the student as it is now, after `version` steps. Collective. Raises StepLost where it fails."""
        ...


class Evaluator(Protocol):
    """Judges the student on held-out data."""

    def evaluate(self, *, stop: Stop) -> Scores:
        """The student as it is now. Collective; leaves no trace in what is trained. Raises Stopping when `stop` is."""
        ...


class Examiner(Protocol):
    """Judges the student by its answers to questions."""

    def examine(self, *, done: int, stop: Stop) -> AnswerScores:
        """As `evaluate`, after `done` steps."""
        ...


class Checkpoints(Protocol):
    """Saved state for continuing."""

    def restore(self) -> int:
        """Load the newest checkpoint, if any; the next step to run. Collective."""
        ...

    def is_due(self) -> bool:
        """Whether so much time has passed since the newest one that another is to be written. Collective."""
        ...

    def save(self, *, next_step: int) -> None:
        """Write everything that continuing at `next_step` needs. Collective."""
        ...


class Exporter(Protocol):
    """Writes the trained model for others to use."""

    def export(self) -> None:
        """Write the student as it is now. Collective."""
        ...


class Snapshots(Protocol):
    """Writes the student for others to use while it goes on learning."""

    def write(self, *, done: int) -> None:
        """Write the student as it is now, after `done` steps. Collective."""
        ...

    def judged(self, *, done: int, scores: Scores | None, answers: AnswerScores | None) -> None:
        """Write it if it is the best one so far, by what an evaluation after `done` steps found. Collective."""
        ...


class Stop(Protocol):
    """Whether somebody wants the run to end early."""

    def is_wanted(self) -> bool:
        """True when any rank was asked to stop. Collective: all ranks get the same answer."""
        ...


class RunStop(Stop, Protocol):
    """A Stop of the whole run."""

    def has_come_too_late(self) -> None:
        """What is left to do is done, whoever wants the run to end: nothing is given up for that any more."""
        ...


class Profiler(Protocol):
    """Looks into steps, on every rank."""

    def watching(self, step: int) -> AbstractContextManager[None]:
        """Look at what happens inside, if somebody wants to know of this step."""
        ...


class Telemetry(Protocol):
    """Tells people and machines how the run goes; silent on every rank but the first."""

    def start(self, first_step: int, steps: int, *, is_judged: bool) -> None:
        """The run begins, or continues, at `first_step` of `steps`. Called once, before everything else.

        Args:
            is_judged: the student is judged before that step, whether an earlier attempt did so or not.
        """
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times what happens inside: batch, update, publish, evaluate, examine, checkpoint or export."""
        ...

    def report(self, step: int, stats: StepStats) -> None:
        """Step `step` is done; it took the phases since the last report."""
        ...

    def report_scores(self, step: int, scores: Scores) -> None:
        """The student after `step` steps, on held-out data."""
        ...

    def report_answers(self, step: int, scores: AnswerScores) -> None:
        """How the student answers questions after `step` steps."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the loop talks to."""

    source: Source
    stepper: Stepper
    publishers: tuple[Publisher, ...]  # empty: nobody uses the student while it learns
    evaluator: Evaluator | None  # None: there is no held-out data
    examiner: Examiner | None = None  # None: there are no questions
    checkpoints: Checkpoints
    exporters: tuple[Exporter, ...]
    snapshots: Snapshots | None = None  # None: the student is written at the end alone
    stop: RunStop
    telemetry: Telemetry
    profiler: Profiler


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When things happen, in steps."""

    steps: int
    evaluate_every: int | None  # None: only before the first step and after the last
    checkpoint_every: int | None  # None: only when due, when stopped and after the last step
    export_every: int | None = None  # None: only after the last step

    def evaluates_at(self, done: int) -> bool:
        """Whether the student is judged when `done` steps are done."""
        return done in (0, self.steps) or (self.evaluate_every is not None and done % self.evaluate_every == 0)

    def saves_at(self, done: int) -> bool:
        """Whether a checkpoint is written when `done` steps are done."""
        return done == self.steps or (self.checkpoint_every is not None and done % self.checkpoint_every == 0)

    def writes_at(self, done: int) -> bool:
        """Whether the student is written for others when `done` steps are done, and more are to do."""
        return self.export_every is not None and done % self.export_every == 0 and done < self.steps


def run(parts: Parts, schedule: Schedule) -> int:
    """Train from where the newest checkpoint left off; the number of steps done.

    Fewer than `schedule.steps` when somebody wanted to stop: then a checkpoint holds
    all of them, and the next run does the rest.

    Raises:
        StepLost: a service failed; a checkpoint holds the steps before.
    """
    first = kept = parts.checkpoints.restore()  # kept: steps that the newest checkpoint holds
    parts.source.start_at(first)
    parts.telemetry.start(first, schedule.steps, is_judged=schedule.evaluates_at(first))
    # Before anything is sampled: servers that were started anew, or have seen later steps than this, must have these.
    if not _begins(parts, schedule, first=first):
        return first
    for step in range(first, schedule.steps):
        done, unpublished = step + 1, None
        try:
            _evaluate_if_due(parts, schedule, done=step, stop=parts.stop)
            with span("step", step=step), parts.profiler.watching(step):
                with parts.telemetry.phase("batch"):
                    batch = parts.source.next_batch()
                with parts.telemetry.phase("update"):
                    stats = parts.stepper.update(batch)
                unpublished = _failure_to_publish(parts, version=done)
        except (Stopping, StepLost) as left:
            if step > kept:
                _save(parts, done=step)
            if isinstance(left, Stopping) or parts.stop.is_wanted():
                return step
            raise
        # Before the checkpoint: a run that dies in between must find this step either to do or on record.
        parts.telemetry.report(step, stats)
        if parts.snapshots is not None and schedule.writes_at(done):
            with parts.telemetry.phase("export"):
                parts.snapshots.write(done=done)
        is_stopping = parts.stop.is_wanted()
        if unpublished is not None or is_stopping or schedule.saves_at(done) or parts.checkpoints.is_due():
            _save(parts, done=done)
            kept = done
        if is_stopping and done < schedule.steps:
            return done
        if unpublished is not None:
            raise unpublished
    parts.stop.has_come_too_late()
    _evaluate_if_due(parts, schedule, done=schedule.steps, stop=NEVER)  # nothing else is left to do
    _export(parts)
    return schedule.steps


def _begins(parts: Parts, schedule: Schedule, *, first: int) -> bool:
    """Publish what the run begins with; False where nobody takes it and the run is to stop, as it was."""
    unpublished = _failure_to_publish(parts, version=first)
    if unpublished is not None and (first == schedule.steps or not parts.stop.is_wanted()):
        raise unpublished
    return unpublished is None


def _export(parts: Parts) -> None:
    with parts.telemetry.phase("export"):
        for exporter in parts.exporters:
            exporter.export()


def _save(parts: Parts, *, done: int) -> None:
    with parts.telemetry.phase("checkpoint"):
        parts.checkpoints.save(next_step=done)


def _publish(parts: Parts, *, version: int) -> None:
    for publisher in parts.publishers:
        with parts.telemetry.phase("publish"):
            publisher.publish(version=version)


def _failure_to_publish(parts: Parts, *, version: int) -> StepLost | None:
    try:
        _publish(parts, version=version)
    except StepLost as error:
        return error
    return None


def _evaluate_if_due(parts: Parts, schedule: Schedule, *, done: int, stop: Stop) -> None:
    if not schedule.evaluates_at(done):
        return
    scores = answers = None
    if parts.evaluator is not None:
        with parts.telemetry.phase("evaluate"):
            scores = parts.evaluator.evaluate(stop=stop)
        parts.telemetry.report_scores(done, scores)
    if parts.examiner is not None:
        with parts.telemetry.phase("examine"):
            answers = parts.examiner.examine(done=done, stop=stop)
        parts.telemetry.report_answers(done, answers)
    if parts.snapshots is not None and done > 0:
        with parts.telemetry.phase("export"):
            parts.snapshots.judged(done=done, scores=scores, answers=answers)
