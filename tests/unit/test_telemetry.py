"""Holds what a run's record contains: one line per step, also after a resume, and the same figures for trackers."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import math
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdmesh import config as kdmesh_config
from kdmesh.errors import CheckpointError, ConfigError
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.questions.estimate import Estimate
from kdmesh_trainer.questions.scores import AnswerScores
from kdmesh_trainer.reporting import progress, telemetry, trackers
from kdmesh_trainer.reporting.metrics import Metrics
from kdmesh_trainer.stats import RolloutFigures, SampleScores, Scores, StepStats
from tests.support.full_disk import files_limited_to


def stats(loss: float = 2.0, wait_s: float = 0.0) -> StepStats:
    return StepStats(
        loss_nats_per_token=loss,
        divergence_nats_per_token=loss,
        cross_entropy_nats_per_token=None,
        top1_agreement=0.5,
        gradient_norm=1.0,
        learning_rate=1e-3,
        num_loss_tokens=10,
        num_tokens=100,
        teacher_wait_s=wait_s,
    )


def sampled_stats(*, teacher_wait_s: float = 0.0, sampling_wait_s: float = 0.0) -> StepStats:
    rollouts = RolloutFigures(
        response_tokens=50,
        response_tokens_mean=12.5,
        response_tokens_max=20,
        cut_off_fraction=0.25,
        staleness_steps_mean=0.5,
        staleness_steps_max=1,
        sampling_wait_s=sampling_wait_s,
        sampling_s=2 * sampling_wait_s,
    )
    samples = SampleScores(
        sampler_kl_k1_nats=0.01, sampler_kl_k3_nats=0.02, student_entropy_nats=1.5, teacher_entropy_nats=1.25
    )
    return replace(stats(wait_s=teacher_wait_s), rollouts=rollouts, samples=samples)


def scores(cross_entropy: float = 1.0) -> Scores:
    return Scores(
        kl_nats_per_token=0.25,
        cross_entropy_nats_per_token=cross_entropy,
        top1_agreement=0.5,
        num_loss_tokens=10,
        num_sequences=2,
    )


def answers() -> AnswerScores:
    return AnswerScores(
        accuracy=Estimate(mean=0.25, standard_error=0.125),
        pass_at={4: Estimate(mean=0.75, standard_error=None)},
        cut_off_fraction=0.5,
        response_tokens_mean=6.5,
        num_questions=2,
        num_samples=8,
        grader_errors=1,
    )


class Recorder:
    """A tracker and a progress display that remember."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def start(self, first_step: int, steps: int | None = None) -> None:
        self.calls.append(("start", first_step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("log", (step, dict(values))))

    def phase(self, name: str) -> None:
        self.calls.append(("phase", name))

    def show(self, reading: progress.Reading) -> None:
        self.calls.append(("show", reading))

    def close(self, *, has_failed: bool | None = None) -> None:
        self.calls.append(("close", has_failed))


def run(path: Path, *, imbalance: float | None = None) -> tuple[telemetry.RunTelemetry, Recorder, Recorder]:
    display, tracker = Recorder(), Recorder()
    record = telemetry.RunTelemetry(
        record=path / "metrics.jsonl",
        progress=display,
        trackers=[tracker],
        metrics=Metrics("job"),
        metrics_server=None,
        doors=lambda: {"shm": "it is the best"},
        imbalance=lambda: imbalance,
    )
    return record, display, tracker


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]


def test_every_step_and_evaluation_is_one_line_that_is_there_at_once(tmp_path: Path) -> None:
    record, _, _ = run(tmp_path)
    record.start(0, 10)
    record.report_scores(0, scores())
    with record.phase("batch"):
        pass
    with record.phase("update"):
        pass
    record.report(0, stats(loss=2.5))
    evaluation, step = lines(tmp_path)
    assert (evaluation["kind"], evaluation["step"]) == ("evaluation", 0)
    assert (step["kind"], step["step"], step["loss_nats_per_token"], step["door"]) == ("step", 0, 2.5, "shm")
    assert evaluation["perplexity"] == pytest.approx(math.e)
    assert set(step["phase_s"]) == {"batch", "update"}
    assert step["tokens_per_second"] == pytest.approx(100 / step["step_s"])
    record.close()


def test_several_held_out_datasets_have_figures_of_their_own_in_files_logs_and_trackers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record, _, tracker = run(tmp_path)
    several = replace(scores(), datasets={"code": scores(0.5), "talk": scores(1.5)})
    with caplog.at_level(logging.INFO):
        record.start(0, 10)
        record.report(0, stats())
        record.report_scores(1, several)
        record.close()
    (line,) = [line for line in lines(tmp_path) if line["kind"] == "evaluation"]
    assert [line[f"cross_entropy_nats_per_token{name}"] for name in ("", ".code", ".talk")] == [1.0, 0.5, 1.5]
    assert line["perplexity.code"] == pytest.approx(math.exp(0.5))
    (tracked,) = [values for kind, (_, values) in tracker.calls[2:3] if kind == "log"]
    assert tracked["held_out/cross_entropy_nats_per_token.talk"] == 1.5
    told = [entry.__dict__ for entry in caplog.records if entry.getMessage() == "held-out data evaluated"]
    assert [(each.get("dataset"), each["cross_entropy_nats_per_token"]) for each in told] == [
        *[(None, 1.0), ("code", 0.5), ("talk", 1.5)]
    ]
    (summary,) = [entry.__dict__ for entry in caplog.records if entry.getMessage() == "run ended"]
    assert summary["held_out_cross_entropy_nats_per_token"] == 1.0
    assert not [name for name in summary if name.startswith("held_out") and "." in name]


def test_answers_are_a_line_of_their_own_for_people_files_trackers_and_prometheus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    display, tracker, metrics = Recorder(), Recorder(), Metrics("job")
    record = telemetry.RunTelemetry(
        record=tmp_path / "metrics.jsonl",
        progress=display,
        trackers=[tracker],
        metrics=metrics,
        metrics_server=None,
        doors=dict,
        imbalance=lambda: None,
    )
    with caplog.at_level(logging.INFO):
        record.start(0, 10)
        record.report(0, stats())
        record.report_scores(1, scores())
        with record.phase("examine"):
            pass
        record.report_answers(1, answers())
        record.report(1, stats())
        record.close()
    line = lines(tmp_path)[2]
    assert (line["kind"], line["step"], line["accuracy"], line["accuracy_standard_error"]) == (
        "questions",
        1,
        0.25,
        0.125,
    )
    assert (line["pass_at_4"], line["pass_at_4_standard_error"], line["grader_errors"]) == (0.75, None, 1)
    assert line["examine_s"] > 0
    assert "examine" not in lines(tmp_path)[3]["phase_s"]
    (tracked,) = [call[1] for kind, call in tracker.calls if kind == "log" and "questions/accuracy" in call[1]]
    assert tracked["questions/pass_at_4"] == 0.75
    assert "questions/pass_at_4_standard_error" not in tracked
    shown = {"kdmesh_job": "job"}
    assert metrics.registry.get_sample_value("kdmesh_trainer_questions_accuracy", shown) == 0.25
    assert metrics.registry.get_sample_value("kdmesh_trainer_questions_pass_at", {**shown, "k": "4"}) == 0.75
    (told,) = [entry.__dict__ for entry in caplog.records if entry.getMessage() == "questions answered"]
    assert (told["step"], told["accuracy"], told["pass_at_4"]) == (1, 0.25, 0.75)
    (ended,) = [entry.__dict__ for entry in caplog.records if entry.getMessage() == "run ended"]
    assert (ended["questions_accuracy"], ended["questions_pass_at_4"]) == (0.25, 0.75)


def test_imbalance_is_told_of_several_teachers_only(tmp_path: Path) -> None:
    for name, imbalance in (("one", None), ("several", 1.25)):
        record, _, tracker = run(tmp_path / name, imbalance=imbalance)
        record.start(0, 10)
        record.report(0, stats())
        record.close()
        (step,) = lines(tmp_path / name)
        assert step.get("teacher_imbalance") == imbalance
        assert dict(tracker.calls)["log"][1].get("train/teacher_imbalance") == imbalance


def test_a_phase_counts_for_the_step_that_is_reported_next(tmp_path: Path) -> None:
    record, _, _ = run(tmp_path)
    record.start(0, 10)
    with record.phase("update"):
        pass
    record.report(0, stats())
    record.report(1, stats())
    first, second = lines(tmp_path)
    assert first["step_s"] > 0
    assert second["phase_s"] == {}
    assert second["tokens_per_second"] is None
    record.close()


@pytest.mark.parametrize("unfinished", ['{"kind": "step", "st', '{"name": "caf\u00e9'])
def test_resuming_leaves_one_line_per_step(tmp_path: Path, unfinished: str) -> None:
    record, _, _ = run(tmp_path)
    record.start(0, 10)
    record.report_scores(0, scores())
    for step in range(4):
        record.report(step, stats(loss=1.0))
    record.report_scores(4, scores())
    record.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(unfinished.encode()[:-1])  # killed while writing, perhaps within a character

    again, _, tracker = run(tmp_path)
    again.start(2, 10)
    again.report(2, stats(loss=9.0))
    again.close()
    record_now = [(line["kind"], line["step"], line.get("loss_nats_per_token")) for line in lines(tmp_path)]
    assert record_now == [("evaluation", 0, None), ("step", 0, 1.0), ("step", 1, 1.0), ("step", 2, 9.0)]
    assert tracker.calls[0] == ("start", 2)


def test_a_run_that_goes_on_after_its_end_keeps_how_it_was_judged_there(tmp_path: Path) -> None:
    record, _, tracker = run(tmp_path)
    record.start(0, 1)
    record.report(0, stats())
    with record.phase("evaluate"):
        pass
    record.report_scores(1, scores())
    record.report_answers(1, answers())
    record.close()
    told, before = [call for call in tracker.calls if call[0] == "log"][1:], lines(tmp_path)

    again, _, tracker = run(tmp_path)
    again.start(1, 2, is_judged=False)
    assert tracker.calls == [("start", 1), *told]
    assert lines(tmp_path) == before

    anew, _, tracker = run(tmp_path)
    anew.start(1, 2, is_judged=True)
    assert tracker.calls == [("start", 1)]
    assert lines(tmp_path) == before[:1]


def test_figures_that_are_not_finite_are_null_and_kept_from_trackers(tmp_path: Path) -> None:
    record, _, tracker = run(tmp_path)
    record.start(0, 10)
    record.report(0, stats(loss=float("nan")))
    record.report_scores(1, scores(cross_entropy=1e6))
    record.close()
    step, evaluation = lines(tmp_path)
    assert step["loss_nats_per_token"] is None
    assert evaluation["perplexity"] is None
    tracked = [name for kind, call in tracker.calls if kind == "log" for name in call[1]]
    assert "train/loss_nats_per_token" not in tracked
    assert "held_out/perplexity" not in tracked
    assert "held_out/kl_nats_per_token" in tracked


def test_figures_of_samples_stand_beside_those_of_the_step(tmp_path: Path) -> None:
    record, display, tracker = run(tmp_path)
    record.start(0, 10)
    with record.phase("update"):
        pass
    record.report(0, sampled_stats())
    record.report(1, stats())
    record.close()
    sampled, plain = lines(tmp_path)
    added = {"response_tokens_mean": 12.5, "response_tokens_max": 20, "cut_off_fraction": 0.25}
    added |= {"staleness_steps_mean": 0.5, "staleness_steps_max": 1, "sampling_wait_s": 0.0, "sampling_s": 0.0}
    added |= {"sampler_kl_k1_nats": 0.01, "sampler_kl_k3_nats": 0.02}
    added |= {"student_entropy_nats": 1.5, "teacher_entropy_nats": 1.25}
    assert {name: sampled[name] for name in added} == added
    assert not {*added, "rollouts", "samples"} & set(plain)
    tracked = [call[1] for kind, call in tracker.calls if kind == "log"]
    assert tracked[0]["train/response_tokens_mean"] == 12.5
    readings = [call for kind, call in display.calls if kind == "show"]
    assert (readings[0].response_tokens_mean, readings[0].sampling_wait_fraction) == (12.5, 0.0)
    assert readings[1].response_tokens_mean is None


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [
        ({"sampling_wait_s": 1e3}, "sampling"),
        ({"teacher_wait_s": 1e3}, "teacher"),
        ({"teacher_wait_s": -1e3}, "update"),  # what is left of the update without its wait
        ({}, "publish"),
    ],
)
def test_the_record_says_what_took_most_of_a_step(tmp_path: Path, seconds: dict[str, float], bound: str) -> None:
    record, display, _ = run(tmp_path)
    record.start(0, 10)
    with record.phase("publish"):
        sum(range(1000))
    record.report(0, sampled_stats(**seconds))
    record.close()
    [line] = lines(tmp_path)
    assert line["bounded_by"] == bound
    [reading] = [call for kind, call in display.calls if kind == "show"]
    assert reading.bounded_by == bound


def test_every_phase_has_its_tokens_per_second_where_it_took_time(tmp_path: Path) -> None:
    record, _, _ = run(tmp_path)
    record.start(0, 10)
    with record.phase("update"):
        sum(range(1_000_000))
    record.report(0, sampled_stats(sampling_wait_s=2.0))
    record.report(1, stats(wait_s=4.0))
    record.close()
    sampled, plain = lines(tmp_path)
    update_s = sampled["phase_s"]["update"]
    assert sampled["phase_tokens_per_second"] == {"sampling": 12.5, "teacher": None, "update": 100 / update_s}
    assert plain["phase_tokens_per_second"] == {"teacher": 25.0, "update": None}
    assert plain["bounded_by"] == "teacher"


def test_the_display_gets_rates_over_recent_steps(tmp_path: Path) -> None:
    record, display, _ = run(tmp_path)
    record.start(0, 10)
    for step in range(3):
        with record.phase("update"):
            pass
        record.report(step, stats(wait_s=0.5))
    readings = [reading for kind, reading in display.calls if kind == "show"]
    assert [reading.done for reading in readings] == [1, 2, 3]
    seconds = sum(line["step_s"] for line in lines(tmp_path))
    assert readings[-1].tokens_per_second == pytest.approx(300 / seconds)
    assert readings[-1].teacher_wait_fraction == pytest.approx(1.5 / seconds)
    record.close()


def test_the_end_is_summarised_with_the_last_scores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record, display, tracker = run(tmp_path)
    with caplog.at_level(logging.INFO):
        record.start(0, 10)
        record.report(0, stats())
        record.report_scores(1, scores())
        record.close()
    (summary,) = [entry.__dict__ for entry in caplog.records if entry.getMessage() == "run ended"]
    assert (summary["steps"], summary["tokens"], summary["held_out_kl_nats_per_token"]) == (1, 100, 0.25)
    assert (summary["door"], summary["door_reasons"]) == ("shm", {"shm": "it is the best"})
    assert (display.calls[-1], tracker.calls[-1]) == (("close", None), ("close", False))


def test_steps_that_were_skipped_are_counted_and_have_no_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record, display, tracker = run(tmp_path)
    skipped = replace(stats(), loss_nats_per_token=None, gradient_norm=None)
    with caplog.at_level(logging.INFO):
        record.start(0, 10)
        for step, each in enumerate((stats(), skipped, skipped)):
            record.report(step, each)
        record.close()
    assert [line["loss_nats_per_token"] for line in lines(tmp_path)] == [2.0, None, None]
    (summary,) = [entry.__dict__ for entry in caplog.records if entry.getMessage() == "run ended"]
    assert (summary["steps"], summary["skipped_steps"], summary["loss_nats_per_token"]) == (3, 2, 2.0)
    shown = [call for kind, call in display.calls if kind == "show"]
    assert [reading.loss_nats_per_token for reading in shown] == [2.0, 2.0, 2.0]
    tracked = [call[1] for kind, call in tracker.calls if kind == "log"]
    assert ["train/loss_nats_per_token" in figures for figures in tracked] == [True, False, False]


def test_a_run_without_steps_left_says_what_to_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kdmesh_trainer")
    for first_step in (9, 10):
        with telemetry.open_telemetry(config(tmp_path), rank=0, doors=dict, imbalance=lambda: None) as record:
            record.start(first_step, 10)
    (said,) = [entry.__dict__ for entry in caplog.records if entry.msg == "all steps were done before"]
    assert said["steps"] == 10
    assert said["next"].startswith("raise `steps`, or `epochs`")


def test_progress_is_logged_at_the_first_and_the_last_step(caplog: pytest.LogCaptureFixture) -> None:
    display = progress.LogProgress(every_s=3600)
    with caplog.at_level(logging.INFO):
        display.start(0, 5)
        for done in range(1, 6):
            display.show(
                progress.Reading(done=done, loss_nats_per_token=1.0, tokens_per_second=10.0, teacher_wait_fraction=0.1)
            )
    assert [(entry.__dict__["done"], entry.__dict__["steps"]) for entry in caplog.records] == [(1, 5), (5, 5)]
    assert caplog.records[-1].__dict__["eta_s"] == 0


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_shows_step_loss_and_time_left_whatever_its_width(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    drawn = io.StringIO()
    terminal = Console(file=drawn, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "console", lambda: terminal)
    display = progress.TerminalProgress()
    display.start(0, 100_000)
    display.show(
        progress.Reading(
            done=50_000,
            loss_nats_per_token=1.25,
            tokens_per_second=123_456.0,
            teacher_wait_fraction=0.1,
            sampling_wait_fraction=0.2,
            response_tokens_mean=4321.0,
            bounded_by="sampling",
        )
    )
    display.close()
    last = [line for line in drawn.getvalue().splitlines() if "step" in line][-1]
    assert "step 50000/100000" in last
    assert "loss 1.2500   0:00 left" in last
    assert ("4,321 tokens/response" in last) is (width == 200)


def config(tmp_path: Path, *names: str) -> TrainerConfig:
    path = tmp_path / "train.yaml"
    tracked = f"trackers: [{', '.join(names)}]" if names else ""
    path.write_text(
        f"output: {tmp_path / 'my-run'}\nsteps: 10\nstudent: {{model: student}}\n"
        f"objective: {{name: sft}}\ndata: {{train: {{format: chat, path: train.jsonl}}}}\n{tracked}\n"
    )
    return kdmesh_config.load(TrainerConfig, path)


def test_only_the_first_rank_records(tmp_path: Path) -> None:
    with telemetry.open_telemetry(config(tmp_path), rank=1, doors=dict, imbalance=lambda: None) as record:
        record.start(0, 10)
        with record.phase("update"):
            record.report(0, stats())
        record.report_scores(1, scores())
        record.report_answers(1, answers())
    assert not (tmp_path / "my-run").exists()


def test_tensorboard_is_written_by_default(tmp_path: Path) -> None:
    with telemetry.open_telemetry(config(tmp_path), rank=0, doors=dict, imbalance=lambda: None) as record:
        record.start(0, 10)
        record.report(0, stats())
    assert list((tmp_path / "my-run" / "tensorboard").iterdir())
    assert len(lines(tmp_path / "my-run")) == 1


def test_progress_is_told_on_a_terminal_that_cannot_redraw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    caplog.set_level(logging.INFO, logger="kdmesh_trainer")
    with telemetry.open_telemetry(config(tmp_path), rank=0, doors=dict, imbalance=lambda: None) as record:
        record.start(0, 10)
        record.report(0, stats())
    assert "progress" in [entry.getMessage() for entry in caplog.records]


@pytest.mark.parametrize("first_step", [0, 2])
def test_tensorboard_hides_what_an_earlier_attempt_wrote(tmp_path: Path, first_step: int) -> None:
    cfg = config(tmp_path)
    for attempt, first in ((1.0, 0), (2.0, first_step)):
        (tracker,) = trackers.build_trackers(cfg)
        tracker.start(first)
        for step in range(first, 3):
            tracker.log(step, {"train/loss": attempt})
        tracker.close()
    read = EventAccumulator(str(cfg.output / "tensorboard")).Reload()
    expected = [(step, 1.0 if step < first_step else 2.0) for step in range(3)]
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == expected


def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    with telemetry.open_telemetry(config(tmp_path), rank=0, doors=dict, imbalance=lambda: None) as record:
        record.start(0, 10)
        (tmp_path / "my-run" / "metrics.jsonl").mkdir()
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be written: .*; checkpoints are untouched"):
            record.report(0, stats())


def test_a_record_that_cannot_be_read_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "my-run" / "metrics.jsonl").mkdir(parents=True)
    with (
        telemetry.open_telemetry(config(tmp_path), rank=0, doors=dict, imbalance=lambda: None) as record,
        pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be written: Is a directory; checkpoints are"),
    ):
        record.start(0, 10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_disk_that_is_full_for_tensorboard_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    tracker = trackers.TensorBoard(importlib.import_module("torch.utils.tensorboard"), tmp_path)
    others = set(threading.enumerate())
    tracker.start(0)
    refusal = pytest.raises(CheckpointError, match="tensorboard cannot be written: File too large; checkpoints are")
    with files_limited_to(1000):
        with refusal:
            for step in range(10_000):
                tracker.log(step, {"loss": 1.0})
        with refusal:
            tracker.close()
    for thread in set(threading.enumerate()) - others:
        thread.join()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"pip install 'kdmesh\[{name}\]'"):
        trackers.build_trackers(config(tmp_path, name))


class FakeService(ModuleType):
    """Stands for the wandb or mlflow module: remembers calls, gives every new run the id r1."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, kwargs or args))
            run = {"log": self.log, "finish": self.finish, "define_metric": self.define_metric}
            return SimpleNamespace(id="r1", info=SimpleNamespace(run_id="r1"), **run)

        return call


def calls_of_a_run_that_is_continued(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    service = FakeService(name)
    monkeypatch.setitem(sys.modules, name, service)
    cfg = config(tmp_path, name)
    cfg.output.mkdir()
    for first_step in (0, 2):
        (tracker,) = trackers.build_trackers(cfg)
        tracker.start(first_step)
        tracker.log(first_step, {"train/loss": 1.0})
        tracker.close()
    return service.calls


def test_wandb_continues_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_a_run_that_is_continued("wandb", tmp_path, monkeypatch)
    opened = [call for name, call in calls if name == "init"]
    assert [(call["id"], call["name"], call["resume"]) for call in opened] == [
        (None, "my-run", "allow"),
        ("r1", "my-run", "allow"),
    ]
    assert opened[0]["config"]["steps"] == 10
    assert [name for name, _ in calls] == ["init", "define_metric", "log", "finish"] * 2


class WandbHistory(ModuleType):
    """Stands for the wandb module of one run: keeps rows by its own count of steps, which never goes back."""

    id = "r1"

    def __init__(self) -> None:
        super().__init__("wandb")
        self.rows: dict[int, dict[str, float]] = {}
        self.drawn_over: dict[str, str] = {}
        self._first = 0

    def init(self, **_: Any) -> WandbHistory:
        self._first = max(self.rows, default=-1) + 1
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.drawn_over[name] = step_metric

    def log(self, values: dict[str, float], *, step: int) -> None:
        if step >= max(self.rows, default=0) and step >= self._first:
            self.rows[step] = self.rows.get(step, {}) | values

    def finish(self, *, exit_code: int) -> None:
        pass

    def curve(self, name: str) -> list[tuple[float, float]]:
        assert self.drawn_over == {"*": "step"}
        return [(row["step"], row[name]) for row in self.rows.values() if name in row]


@pytest.mark.parametrize(("name", "opens"), [("wandb", {"id": None}), ("mlflow", {"run_name": "my-run"})])
def test_a_run_whose_id_was_cut_off_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, opens: dict[str, Any]
) -> None:
    cfg = config(tmp_path, name)
    cfg.output.mkdir()
    (cfg.output / f"{name}_run_id").touch()
    service = started(tmp_path, name, {}, monkeypatch)
    [opened] = [call for method, call in service.calls if method in ("init", "start_run")]
    assert opens.items() <= opened.items()
    assert (cfg.output / f"{name}_run_id").read_text() == "r1"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_id_that_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers, "write_synced", full)
    with pytest.raises(CheckpointError, match=f"{name}_run_id cannot be written: No space left on device"):
        started(tmp_path, name, {}, monkeypatch)


class _FullTracker(Recorder):
    """Cannot write what is pending."""

    def close(self, *, has_failed: bool | None = None) -> None:
        raise CheckpointError("no space left")


@pytest.mark.parametrize("full_first", [True, False])
def test_a_tracker_that_cannot_write_keeps_no_other_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_first: bool
) -> None:
    other = Recorder()
    both = [_FullTracker(), other] if full_first else [other, _FullTracker()]
    monkeypatch.setattr(telemetry, "build_trackers", lambda cfg: both)
    opened = telemetry.open_telemetry(config(tmp_path), rank=0, doors=dict, imbalance=lambda: None)
    with pytest.raises(CheckpointError, match="no space left"), opened:
        pass
    assert other.calls == [("close", False)]


@pytest.mark.parametrize("failure", [None, CheckpointError("full"), KeyboardInterrupt()])
def test_trackers_are_told_whether_the_run_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException | None
) -> None:
    services = {name: FakeService(name) for name in ("wandb", "mlflow")}
    for name, service in services.items():
        monkeypatch.setitem(sys.modules, name, service)
    cfg = config(tmp_path, "wandb", "mlflow")
    with (
        contextlib.nullcontext() if failure is None else pytest.raises(type(failure)),
        telemetry.open_telemetry(cfg, rank=0, doors=dict, imbalance=lambda: None) as record,
    ):
        record.start(0, 2)
        if failure is not None:
            raise failure
    ends = [services["wandb"].calls[-1], services["mlflow"].calls[-1]]
    is_well = failure is None
    assert ends == [("finish", {"exit_code": 0 if is_well else 1}), ("end_run", ("FINISHED" if is_well else "FAILED",))]


def test_wandb_has_every_step_of_a_run_that_went_on_for_more_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = WandbHistory()
    monkeypatch.setitem(sys.modules, "wandb", history)
    cfg = config(tmp_path, "wandb")
    cfg.output.mkdir()
    for attempt, (first, steps) in enumerate([(0, 2), (2, 4), (3, 5)]):
        (tracker,) = trackers.build_trackers(cfg)
        tracker.start(first)
        for step in range(first, steps + 1):
            tracker.log(step, {"held_out/kl": attempt})
            tracker.log(step, {"questions/accuracy": attempt})
            if step < steps:
                tracker.log(step, {"train/loss": attempt, "train/tokens": 7.0})
        tracker.close()
    for name in ("held_out/kl", "questions/accuracy"):
        assert history.curve(name) == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2)]
    assert history.curve("train/loss") == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]
    assert history.curve("train/tokens") == [(step, 7) for step in range(5)]


def test_mlflow_continues_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_a_run_that_is_continued("mlflow", tmp_path, monkeypatch)
    assert [call for name, call in calls if name == "start_run"] == [{"run_name": "my-run"}, {"run_id": "r1"}]
    assert [name for name, _ in calls][-3:] == ["start_run", "log_metrics", "end_run"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, ("kdmesh", "my-run")), ({"WANDB_PROJECT": "ours", "WANDB_NAME": "third"}, ("ours", "third"))],
)
def test_wandbs_own_variables_say_where_a_run_belongs(
    variables: dict[str, str], expected: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = started(tmp_path, "wandb", variables, monkeypatch)
    [(_, call), _] = service.calls
    assert (call["project"], call["name"]) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, [("kdmesh",)]),
        ({"MLFLOW_EXPERIMENT_NAME": "ours"}, []),  # MLflow takes it where nobody has set another
        ({"MLFLOW_EXPERIMENT_ID": "7"}, []),
    ],
)
def test_mlflows_own_variables_say_where_a_run_belongs(
    variables: dict[str, str], expected: list[tuple[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = started(tmp_path, "mlflow", variables, monkeypatch)
    assert [call for name, call in service.calls if name == "set_experiment"] == expected


def started(tmp_path: Path, name: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> FakeService:
    service = FakeService(name)
    monkeypatch.setitem(sys.modules, name, service)
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    cfg = config(tmp_path, name)
    cfg.output.mkdir(exist_ok=True)
    (tracker,) = trackers.build_trackers(cfg)
    tracker.start(0)
    return service
