"""Holds what the demo keeps, forgets and reports, without training anything."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdmesh.demo import plan as plans
from kdmesh.demo import workspace as places
from kdmesh.demo.corpus import Corpus, Example
from kdmesh.demo.live import figures
from kdmesh.demo.on_policy_report import write_report as write_on_policy_report
from kdmesh.demo.outcome import OnPolicyOutcome, Outcome, check_same_start
from kdmesh.demo.plan import BRIEF, STANDARD
from kdmesh.demo.record import read_record, read_sampled
from kdmesh.demo.report import write_report
from kdmesh.errors import ConfigError, KdmeshError
from kdmesh.preflight import check
from kdmesh_rollout.config import RolloutConfig
from kdmesh_teacher.config import TeacherConfig
from kdmesh_trainer.config import TrainerConfig

CORPUS = Corpus(
    train=(Example(module="a", source="def f(x):\n    return x < 1 & x", docstring="Return whether x is small."),),
    held_out=(Example(module="b", source="def g(): pass", docstring="Do <nothing>."),),
)


def metrics(path: Path, *, kl: list[float], steps: int = 12, door: str | None = "shm") -> Path:
    """A metrics.jsonl as the trainer writes it, with evaluations spread over the steps."""
    every = steps // (len(kl) - 1)
    lines: list[dict[str, object]] = []
    for step in range(steps + 1):
        if step % every == 0:
            value = kl[step // every]
            lines.append(
                {
                    "kind": "evaluation",
                    "step": step,
                    "time": 100.0 + step,
                    "kl_nats_per_token": value,
                    "perplexity": 40 + 100 * value,
                    "top1_agreement": 1 / (1 + value),
                }
            )
        if step < steps:
            lines.append(
                {
                    "kind": "step",
                    "step": step,
                    "time": 100.0 + step,
                    "loss_nats_per_token": 3.0 - 0.1 * step,
                    "cross_entropy_nats_per_token": 3.0 - 0.1 * step,
                    "num_tokens": 1000,
                    "step_s": 0.5,
                    "teacher_wait_s": 0.125,
                    "door": door,
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    return Outcome(
        teacher=read_record(metrics(tmp_path / "t.jsonl", kl=[3.0, 0.0])),
        sft=read_record(metrics(tmp_path / "s.jsonl", kl=[2.0, 1.0, 0.6])),
        kd=read_record(metrics(tmp_path / "k.jsonl", kl=[2.0, 0.5, 0.2])),
        seconds={"corpus and tokenizer": 4.0, "train & test": 30.0},
        is_teacher_cached=False,
        report=tmp_path / "report.html",
    )


def test_the_line_for_machines_has_every_figure(outcome: Outcome) -> None:
    figures = json.loads(outcome.json())
    assert (figures["kl_initial"], figures["kl_sft"], figures["kl_kd"]) == (2.0, 0.6, 0.2)
    assert figures["tokens_per_second"] == 2000
    assert figures["teacher_wait_fraction"] == 0.25
    assert figures["handle_door"] == "shm"
    assert figures["report"].endswith("report.html")
    assert figures["perplexity_teacher"] == 40


def test_the_result_is_told_as_it_is(outcome: Outcome) -> None:
    assert "3.0 times nearer" in outcome.sentence()
    assert "did not" in replace(outcome, kd=outcome.sft, sft=outcome.kd).sentence()


def test_students_that_did_not_start_alike_are_not_compared(outcome: Outcome, tmp_path: Path) -> None:
    check_same_start(outcome.sft, outcome.kd)
    with pytest.raises(KdmeshError, match="did not start alike"):
        check_same_start(outcome.sft, read_record(metrics(tmp_path / "x.jsonl", kl=[2.1, 0.5, 0.2])))


@pytest.fixture
def on_policy_outcome(tmp_path: Path) -> OnPolicyOutcome:
    path = metrics(tmp_path / "o.jsonl", kl=[0.9, 0.5, 0.3])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "step":
            row |= {
                "divergence_nats_per_token": 1.0 - 0.05 * row["step"],
                "response_tokens_mean": 20.0 + row["step"],
                "cut_off_fraction": 0.25,
                "staleness_steps_max": int(row["step"] > 0),
                "sampler_kl_k3_nats": 0.001,
                "student_entropy_nats": 2.0,
                "teacher_entropy_nats": 1.0,
                "sampling_wait_s": 0.25,
                "phase_s": {"batch": 0.25, "update": 0.2, "publish": 0.05},
            }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return OnPolicyOutcome(
        teacher=read_record(metrics(tmp_path / "t.jsonl", kl=[3.0, 0.0])),
        run=read_record(path),
        sampled=read_sampled(path),
        seconds={"learn": 30.0},
        is_teacher_cached=True,
        report=tmp_path / "report.html",
    )


def test_the_line_for_machines_has_every_figure_of_the_samples(on_policy_outcome: OnPolicyOutcome) -> None:
    figures = json.loads(on_policy_outcome.json())
    assert (figures["kl_before"], figures["kl_after"]) == (0.9, 0.3)
    assert figures["own_answers_kl_before"] == 1.0
    assert figures["own_answers_kl_after"] == pytest.approx(0.45)
    assert figures["sampling_wait_fraction"] == 0.5
    assert figures["staleness_steps_max"] == 1
    assert figures["response_tokens_mean"] == 31


def test_what_own_answers_did_is_told_as_it_is(on_policy_outcome: OnPolicyOutcome) -> None:
    assert "3.0 times nearer" in on_policy_outcome.sentence()
    run = on_policy_outcome.run
    backwards = replace(run, evaluations=run.evaluations[::-1])
    assert "did not" in replace(on_policy_outcome, run=backwards).sentence()


class Page(HTMLParser):
    """Collects what a browser would fetch, every id, and unbalanced tags."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.links.append(value)
            if name == "id" and value:
                self.ids.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(outcome: Outcome, tmp_path: Path) -> None:
    (tmp_path / "kd.yaml").write_text("steps: 12  # <b>\n")
    write_report(outcome, STANDARD, CORPUS, config=tmp_path / "kd.yaml")
    text = outcome.report.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg") == 4
    assert not re.search(r"\$\w|#a1b2c|url\(http|@import|<script", text)
    for words in ("Do &lt;nothing&gt;.", "# &lt;b&gt;", "train &amp; test", "0.2000", "3.0 times nearer", "shm"):
        assert words in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_of_samples_is_whole_too(on_policy_outcome: OnPolicyOutcome, tmp_path: Path) -> None:
    (tmp_path / "on-policy.yaml").write_text("source: {kind: on_policy}\n")
    write_on_policy_report(on_policy_outcome, STANDARD, CORPUS, config=tmp_path / "on-policy.yaml")
    text = on_policy_outcome.report.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg") == 6
    assert not re.search(r"\$\w|#a1b2c|url\(http|@import|<script", text)
    for words in ("0.300", "3.0 times nearer", "kind: on_policy", "of a step was spent waiting for samples"):
        assert words in text


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    path = metrics(tmp_path / "m.jsonl", kl=[1.0, 0.5])
    whole = read_record(path)
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert read_record(path) == whole
    assert read_record(tmp_path / "none.jsonl").done == 0


def test_the_live_line_says_step_loss_speed_wait_and_time_left(tmp_path: Path) -> None:
    shown = figures(read_record(metrics(tmp_path / "m.jsonl", kl=[1.0, 0.5])), steps=72)
    for words in ("[bold]12[/]/72", "loss [bold]1.900[/]", "2,000 tokens/s", "teacher wait 25%", "1:00 left"):
        assert words in shown
    without = figures(read_record(metrics(tmp_path / "n.jsonl", kl=[1.0, 0.5], door=None)), steps=72)
    assert "teacher wait" not in without


def test_the_teacher_is_kept_under_a_name_of_everything_it_depends_on(tmp_path: Path) -> None:
    def cached(plan: plans.Plan, corpus: Corpus, name: str) -> Path:
        return places.open_workspace(plan, corpus, output=tmp_path / name, cache=tmp_path / "cache").cached

    first = cached(STANDARD, CORPUS, "a")
    assert cached(STANDARD, CORPUS, "b") == first
    student = replace(STANDARD, student_training=replace(STANDARD.student_training, steps=7))
    assert cached(student, CORPUS, "c") == first
    teacher = replace(STANDARD, teacher_training=replace(STANDARD.teacher_training, steps=7))
    assert cached(teacher, CORPUS, "d") != first
    assert cached(STANDARD, replace(CORPUS, held_out=()), "e") != first


def test_another_plan_forgets_the_students_and_the_same_one_keeps_them(tmp_path: Path) -> None:
    def opened(plan: plans.Plan) -> places.Workspace:
        return places.open_workspace(plan, CORPUS, output=tmp_path / "demo", cache=tmp_path / "cache")

    workspace = opened(STANDARD)
    places.add_seconds(workspace.run("kd"), 1.5)
    places.add_seconds(workspace.run("kd"), 2.0)
    places.add_seconds(workspace.run(places.ON_POLICY), 1.0)
    assert places.read_seconds(opened(STANDARD).run("kd")) == 3.5
    assert not opened(BRIEF).run("kd").exists()
    assert not workspace.run(places.ON_POLICY).exists()


def test_a_directory_with_something_else_in_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="something else"):
        places.open_workspace(STANDARD, CORPUS, output=tmp_path, cache=tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, cache in (("file/demo", "cache"), ("demo", "file/cache")):
        with pytest.raises(ConfigError, match="file is not a directory"):
            places.open_workspace(STANDARD, CORPUS, output=tmp_path / output, cache=tmp_path / cache)
    with pytest.raises(ConfigError, match="/proc/demo cannot be written"):
        places.open_workspace(STANDARD, CORPUS, output=Path("/proc/demo"), cache=tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_is_finished_when_its_last_evaluation_and_its_model_are_there(tmp_path: Path) -> None:
    metrics(tmp_path / "run" / "metrics.jsonl", kl=[1.0, 0.5], steps=12)
    assert not places.is_finished(tmp_path / "run", steps=12)
    (tmp_path / "run" / "final").mkdir()
    assert places.is_finished(tmp_path / "run", steps=12)
    assert not places.is_finished(tmp_path / "run", steps=24)


@pytest.mark.parametrize("plan", [STANDARD, BRIEF], ids=["standard", "brief"])
def test_the_configurations_of_the_demo_load(plan: plans.Plan, tmp_path: Path) -> None:
    workspace = places.open_workspace(plan, CORPUS, output=tmp_path / "demo", cache=tmp_path / "cache")
    paths = {"corpus": workspace.corpus, "start": workspace.student_start, "output": workspace.run("kd")}
    for tree, kind in (
        (plans.teacher_training(plan, **paths), TrainerConfig),
        (plans.student_training(plan, **paths, objective={"name": "sft"}), TrainerConfig),
        (plans.student_training(plan, **paths, objective={"name": "distill"}), TrainerConfig),
        (plans.warm_up(plan, **paths), TrainerConfig),
        (plans.on_policy(plan, **paths), TrainerConfig),
        (plans.teacher_server(plan, model=workspace.teacher_model), TeacherConfig),
        (plans.rollout_server(plan, model=workspace.student_start), RolloutConfig),
    ):
        assert isinstance(check.load_any(workspace.write_config("some", tree)), kind)
