"""The training loop, with a recorder that plays every part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kdmesh_trainer.loop import Parts, Schedule, Stop, run
from kdmesh_trainer.questions.estimate import Estimate
from kdmesh_trainer.questions.scores import AnswerScores
from kdmesh_trainer.sources.batches import StepBatch
from kdmesh_trainer.stats import Scores, StepStats
from kdmesh_trainer.stop import StepLost, Stopping

SCORES = Scores(
    kl_nats_per_token=None, cross_entropy_nats_per_token=1.0, top1_agreement=None, num_loss_tokens=1, num_sequences=1
)

ANSWERS = AnswerScores(
    accuracy=Estimate(mean=0.5, standard_error=None),
    pass_at={},
    cut_off_fraction=0.0,
    response_tokens_mean=1.0,
    num_questions=1,
    num_samples=1,
    grader_errors=0,
)


class Recorder:
    """Plays every part and writes down what the loop asks for."""

    def __init__(
        self,
        *,
        first: int = 0,
        stop_after: int | None = None,
        stop_while_judged_after: int | None = None,
        due_after: int | None = None,
        lost: int | None = None,
        unpublished: int | None = None,
        stop_once: str | None = None,
    ) -> None:
        """`lost` is a step that cannot be done, `unpublished` a student that nobody takes."""
        self.events: list[str] = []
        self.watched: list[int] = []
        self.too_late_after = ""
        self._first = first
        self._stop_after = stop_after
        self._stop_while_judged_after = stop_while_judged_after
        self._due_after = due_after
        self._lost = lost
        self._unpublished = unpublished
        self._stop_once = stop_once
        self._done = 0

    def restore(self) -> int:
        self.events.append("restore")
        return self._first

    def start_at(self, step: int) -> None:
        self.events.append(f"source at {step}")
        self._done = step

    def start(self, first_step: int, steps: int, *, is_judged: bool) -> None:
        self.events.append(f"start {first_step}" if is_judged else f"start {first_step}, not judged")
        self.told_steps = steps

    def next_batch(self) -> StepBatch:
        return StepBatch(step=self._done, micro_batches=(), num_loss_tokens=1, num_tokens=2, loss_weight=1)

    def update(self, batch: StepBatch) -> StepStats:
        if batch.step == self._lost:
            raise StepLost("no teacher has answered")
        self.events.append(f"update {batch.step}")
        self._done = batch.step + 1
        return StepStats(
            loss_nats_per_token=0.0,
            divergence_nats_per_token=None,
            cross_entropy_nats_per_token=None,
            top1_agreement=None,
            gradient_norm=1.0,
            learning_rate=0.1,
            num_loss_tokens=1,
            num_tokens=2,
            teacher_wait_s=0.0,
        )

    def publish(self, *, version: int) -> None:
        self.events.append(f"publish {version}")
        if version == self._unpublished:
            raise StepLost("nobody took it")

    def evaluate(self, *, stop: Stop) -> Scores:
        self.events.append("evaluate")
        if stop.is_wanted():
            raise Stopping
        return SCORES

    def examine(self, *, done: int, stop: Stop) -> AnswerScores:
        self.events.append(f"examine {done}")
        return ANSWERS

    def is_due(self) -> bool:
        return self._done == self._due_after

    def save(self, *, next_step: int) -> None:
        self.events.append(f"save {next_step}")

    def export(self) -> None:
        self.events.append("export")

    def write(self, *, done: int) -> None:
        self.events.append(f"write {done}")

    def judged(self, *, done: int, scores: Scores | None, answers: AnswerScores | None) -> None:
        told = [name for name, found in (("scores", scores), ("answers", answers)) if found is not None]
        self.events.append(f"judged {done} by {' and '.join(told)}")

    def is_wanted(self) -> bool:
        if self._stop_once is not None:
            return self._stop_once in self.events
        is_judging = self.events[-1] == "evaluate"
        return self._done == (self._stop_while_judged_after if is_judging else self._stop_after)

    def has_come_too_late(self) -> None:
        self.too_late_after = self.without_phases()[-1]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.events.append(f"<{name}")
        yield
        self.events.append(f"{name}>")

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        self.watched.append(step)
        yield

    def report(self, step: int, stats: StepStats) -> None:
        self.events.append(f"report {step}")

    def report_scores(self, step: int, scores: Scores) -> None:
        self.events.append(f"scores {step}")

    def report_answers(self, step: int, scores: AnswerScores) -> None:
        self.events.append(f"answers {step}")

    def parts(
        self,
        *,
        has_held_out: bool = True,
        publishes: bool = False,
        has_questions: bool = False,
        has_snapshots: bool = False,
    ) -> Parts:
        return Parts(
            source=self,
            stepper=self,
            publishers=(self,) if publishes else (),
            evaluator=self if has_held_out else None,
            examiner=self if has_questions else None,
            checkpoints=self,
            exporters=(self,),
            snapshots=self if has_snapshots else None,
            stop=self,
            telemetry=self,
            profiler=self,
        )

    def without_phases(self) -> list[str]:
        return [event for event in self.events if event[0] != "<" and event[-1] != ">"]


def schedule(
    steps: int,
    *,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    export_every: int | None = None,
) -> Schedule:
    return Schedule(
        steps=steps, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every, export_every=export_every
    )


def test_a_run_restores_trains_saves_judges_and_exports_in_this_order() -> None:
    recorder = Recorder()
    assert run(recorder.parts(), schedule(2)) == 2
    assert recorder.events == [
        *("restore", "source at 0", "start 0"),
        *("<evaluate", "evaluate", "evaluate>", "scores 0"),
        *("<batch", "batch>", "<update", "update 0", "update>", "report 0"),
        *("<batch", "batch>", "<update", "update 1", "update>", "report 1", "<checkpoint", "save 2", "checkpoint>"),
        *("<evaluate", "evaluate", "evaluate>", "scores 2"),
        *("<export", "export", "export>"),
    ]


def test_every_step_may_be_looked_into() -> None:
    recorder = Recorder(first=1)
    run(recorder.parts(), schedule(4))
    assert recorder.watched == [1, 2, 3]


def test_evaluations_and_checkpoints_come_when_they_are_due() -> None:
    recorder = Recorder()
    run(recorder.parts(), schedule(5, evaluate_every=2, checkpoint_every=3))
    events = recorder.without_phases()
    assert [event for event in events if event.startswith("scores")] == ["scores 0", "scores 2", "scores 4", "scores 5"]
    assert [event for event in events if event.startswith("save")] == ["save 3", "save 5"]
    assert events.index("scores 2") > events.index("update 1")
    assert events.index("scores 2") < events.index("update 2")


def test_a_checkpoint_that_is_due_by_the_clock_is_written_after_the_step() -> None:
    recorder = Recorder(due_after=2)
    run(recorder.parts(has_held_out=False), schedule(5, checkpoint_every=4))
    saves = [event for event in recorder.without_phases() if event.startswith(("report", "save"))]
    assert saves == ["report 0", "report 1", "save 2", "report 2", "report 3", "save 4", "report 4", "save 5"]


def test_questions_are_asked_of_the_published_student_whenever_it_is_judged() -> None:
    recorder = Recorder()
    run(recorder.parts(publishes=True, has_questions=True), schedule(3, evaluate_every=2))
    judged = [("evaluate", f"scores {done}", f"examine {done}", f"answers {done}") for done in (0, 2, 3)]
    assert recorder.without_phases() == [
        *("restore", "source at 0", "start 0", "publish 0", *judged[0]),
        *("update 0", "publish 1", "report 0", "update 1", "publish 2", "report 1", *judged[1]),
        *("update 2", "publish 3", "report 2", "save 3", *judged[2], "export"),
    ]
    assert recorder.events.count("<examine") == recorder.events.count("examine>") == 3
    without_data = Recorder()
    run(without_data.parts(has_held_out=False, has_questions=True), schedule(1))
    assert [event for event in without_data.without_phases() if event.startswith(("eval", "exam"))] == [
        "examine 0",
        "examine 1",
    ]


def test_students_are_written_on_the_way_before_a_checkpoint_says_that_the_step_is_done() -> None:
    recorder = Recorder()
    run(recorder.parts(has_snapshots=True), schedule(4, evaluate_every=3, checkpoint_every=2, export_every=2))
    assert recorder.without_phases() == [
        *("restore", "source at 0", "start 0", "evaluate", "scores 0"),  # nothing has been learnt that could be best
        *("update 0", "report 0", "update 1", "report 1", "write 2", "save 2"),
        *("update 2", "report 2", "evaluate", "scores 3", "judged 3 by scores"),
        *("update 3", "report 3", "save 4", "evaluate", "scores 4", "judged 4 by scores", "export"),
    ]
    both = Recorder()
    run(both.parts(has_snapshots=True, has_questions=True), schedule(1))
    assert both.without_phases()[-2:] == ["judged 1 by scores and answers", "export"]


def test_a_stop_ends_after_the_current_step_with_a_checkpoint() -> None:
    recorder = Recorder(stop_after=2)
    assert run(recorder.parts(), schedule(5, evaluate_every=2)) == 2
    assert recorder.without_phases()[-3:] == ["update 1", "report 1", "save 2"]


def test_a_stop_during_the_last_step_changes_nothing() -> None:
    recorder, other = Recorder(stop_after=3), Recorder()
    assert run(recorder.parts(), schedule(3)) == run(other.parts(), schedule(3)) == 3
    assert recorder.events == other.events


def test_once_the_last_step_is_saved_nothing_is_given_up_for_a_stop() -> None:
    recorder = Recorder(stop_after=3)
    run(recorder.parts(), schedule(3))
    assert recorder.too_late_after == "save 3"
    assert recorder.without_phases()[-3:] == ["evaluate", "scores 3", "export"]
    stopped = Recorder(stop_after=2)
    run(stopped.parts(), schedule(3))
    assert not stopped.too_late_after


def test_a_continued_run_starts_where_the_checkpoint_says() -> None:
    recorder = Recorder(first=3)
    assert run(recorder.parts(has_held_out=False), schedule(5)) == 5
    assert recorder.told_steps == 5
    assert recorder.without_phases() == [
        *("restore", "source at 3", "start 3, not judged"),
        *("update 3", "report 3", "update 4", "report 4", "save 5", "export"),
    ]


def test_a_run_that_was_killed_after_its_last_step_is_finished() -> None:
    recorder = Recorder(first=5)
    run(recorder.parts(), schedule(5))
    assert recorder.without_phases() == ["restore", "source at 5", "start 5", "evaluate", "scores 5", "export"]


def test_the_student_is_published_before_the_first_step_and_after_each_update() -> None:
    recorder = Recorder(first=3)
    run(recorder.parts(has_held_out=False, publishes=True), schedule(5, checkpoint_every=1))
    assert recorder.without_phases() == [
        *("restore", "source at 3", "start 3, not judged", "publish 3"),
        *("update 3", "publish 4", "report 3", "save 4"),
        *("update 4", "publish 5", "report 4", "save 5", "export"),
    ]
    assert recorder.events.count("<publish") == recorder.events.count("publish>") == 3


@pytest.mark.parametrize("first", [0, 2])
def test_a_run_may_end_before_its_first_step_while_it_is_judged(first: int) -> None:
    recorder = Recorder(first=first, stop_while_judged_after=first)
    assert run(recorder.parts(), schedule(4, evaluate_every=2)) == first
    assert recorder.without_phases() == ["restore", f"source at {first}", f"start {first}", "evaluate"]


@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_a_run_that_ends_while_it_is_judged_has_its_steps_in_one_checkpoint(checkpoint_every: int | None) -> None:
    recorder = Recorder(stop_while_judged_after=2)
    assert run(recorder.parts(), schedule(4, evaluate_every=2, checkpoint_every=checkpoint_every)) == 2
    assert [event for event in recorder.events if event.startswith("save")] == ["save 2"]
    assert not {"scores 2", "update 2", "export"} & set(recorder.events)


def test_a_run_that_is_to_end_while_it_is_judged_at_last_is_complete() -> None:
    recorder = Recorder(stop_while_judged_after=2)
    assert run(recorder.parts(), schedule(2)) == 2
    assert recorder.without_phases()[-2:] == ["scores 2", "export"]


def test_a_checkpoint_that_was_due_is_not_written_again_when_the_run_ends_while_it_is_judged() -> None:
    recorder = Recorder(stop_while_judged_after=2, due_after=2)
    assert run(recorder.parts(), schedule(4, evaluate_every=2)) == 2
    assert [event for event in recorder.events if event.startswith("save")] == ["save 2"]


@pytest.mark.parametrize("checkpoint_every", [None, 3])
def test_a_step_that_is_lost_ends_the_run_with_the_steps_before_it_in_a_checkpoint(
    checkpoint_every: int | None,
) -> None:
    recorder = Recorder(lost=3)
    with pytest.raises(StepLost, match="no teacher has answered"):
        run(recorder.parts(has_held_out=False), schedule(5, checkpoint_every=checkpoint_every))
    after = [event for event in recorder.without_phases() if event.startswith(("report", "save", "export"))]
    assert after == ["report 0", "report 1", "report 2", "save 3"]


def test_a_step_that_is_lost_when_the_run_is_to_stop_is_only_left_out() -> None:
    recorder = Recorder(lost=3, stop_once="save 3")
    assert run(recorder.parts(has_held_out=False), schedule(5)) == 3
    assert recorder.without_phases()[-1] == "save 3"


def test_a_first_step_that_is_lost_leaves_nothing_new() -> None:
    recorder = Recorder(first=2, lost=2)
    with pytest.raises(StepLost):
        run(recorder.parts(has_held_out=False), schedule(5))
    assert recorder.without_phases() == ["restore", "source at 2", "start 2, not judged"]


def test_a_student_that_nobody_takes_ends_the_run_with_its_step_on_record_and_in_a_checkpoint() -> None:
    recorder = Recorder(unpublished=2)
    with pytest.raises(StepLost, match="nobody took it"):
        run(recorder.parts(has_held_out=False, publishes=True), schedule(5))
    assert recorder.without_phases()[-4:] == ["update 1", "publish 2", "report 1", "save 2"]


def test_a_run_that_is_to_stop_while_nobody_takes_its_first_student_has_lost_nothing() -> None:
    recorder = Recorder(first=2, unpublished=2, stop_once="publish 2")
    assert run(recorder.parts(has_held_out=False, publishes=True), schedule(5)) == 2
    assert recorder.without_phases()[-1] == "publish 2"
    for steps, stop_once in ((5, None), (2, "publish 2")):  # nobody asked for it; no step is left
        with pytest.raises(StepLost, match="nobody took it"):
            parts = Recorder(first=2, unpublished=2, stop_once=stop_once).parts(has_held_out=False, publishes=True)
            run(parts, schedule(steps))
