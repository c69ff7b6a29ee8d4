"""Jobs that ask their student questions through real rollout servers, which are killed meanwhile."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tiny_models import TinyModels
from tests.system.processes import Process, Processes
from tests.system.rollouts import Rollouts
from tests.system.training import KDMESH, Job, Recipe

pytestmark = pytest.mark.slow

STEPS = 60
COLOURS = {
    "ant": "red",
    "bee": "blue",
    "cat": "green",
    "dog": "black",
    "elk": "white",
    "fox": "brown",
    "gnu": "grey",
    "hen": "pink",
}
SAMPLES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Jobs of one recipe, which learn the answers by heart."""

    undisturbed: Job  # with a rollout server of its own, started by the same command
    disturbed: Job  # its rollout server was killed while it answered, and then it itself
    unasked: Job  # has no questions
    first: Process  # of the disturbed job
    second: Process
    rollouts: Rollouts  # of the disturbed job; still serves its student


def questions(data: Path, **more: Any) -> dict[str, Any]:
    return {
        "path": str(data / "questions.jsonl"),
        "samples": SAMPLES,
        "pass_at": [1, SAMPLES],
        "sampling": {"temperature": 0.5, "max_new_tokens": 24},
        **more,
    }


def evaluation(data: Path, addresses: list[str], **more: Any) -> dict[str, Any]:
    return {
        "every": 20,
        "rollouts": {"addresses": addresses, "deadline_s": 100},
        "questions": questions(data, **more),
    }


def asked(job: Job) -> list[dict[str, Any]]:
    return [line for line in job.lines() if line["kind"] == "questions"]


@pytest.fixture(scope="module")
def recipe(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    data = tmp_path_factory.mktemp("colours")
    rows = [{"question": f"which colour has the {animal}?", "answer": colour} for animal, colour in COLOURS.items()]
    chats = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in rows
    ]
    for name, lines in (("questions", rows), ("train", chats)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Recipe(student=tiny_models.path("qwen3", seed=1, hidden_size=64), data=data, objective={})


def learning_by_heart(processes: Processes, directory: Path, recipe: Recipe, **sections: Any) -> Job:
    return Job(
        processes,
        directory,
        recipe,
        **{
            "objective": {"name": "sft"},
            "batch": {"sequences": 8, "max_tokens": 512},
            "optimizer": {"learning_rate": 5e-3, "schedule": "constant"},
            "steps": STEPS,
            "checkpoint": {"every": 10},
            **sections,
        },
    )


@pytest.fixture(scope="module")
def story(recipe: Recipe, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp("q")  # short: Unix sockets have short names
    rollouts = Rollouts(processes, root / "rollouts", recipe.student, can_be_held=True)
    rollouts.start()
    rollouts.wait_ready()
    rollouts.hold()
    served = root / "rollout.yaml"
    engine = {"kind": "transformers", "model": str(recipe.student), "device": "cpu", "deterministic": True}
    served.write_text(yaml.safe_dump({"engine": engine}), encoding="utf-8")
    undisturbed, disturbed = (
        learning_by_heart(processes, root / name, recipe, evaluation=evaluation(recipe.data, addresses))
        for name, addresses in (("undisturbed", []), ("disturbed", [rollouts.address]))
    )
    unasked = learning_by_heart(processes, root / "unasked", recipe, steps=25)
    command = (KDMESH, "train", str(undisturbed.write()), "--serve-rollout", str(served), "--set", "ranks=2")
    whole = processes.start("trainer", root / "undisturbed", *command)
    first = disturbed.start_ranks(2)
    first.until(lambda: rollouts.num_waiting() >= 8)  # in the middle of an evaluation
    rollouts.process.signal(signal.SIGKILL)
    rollouts.let_go()
    rollouts.start()
    first.until(lambda: len(disturbed.steps()) >= 25)
    first.signal(signal.SIGKILL)
    first.exit_code()
    second = disturbed.start_ranks(2)
    plain = unasked.start_ranks(2)
    for process in (whole, second, plain):
        process.succeed()
    return Story(
        undisturbed=undisturbed,
        disturbed=disturbed,
        unasked=unasked,
        first=first,
        second=second,
        rollouts=rollouts,
    )


def test_what_a_student_has_learnt_by_heart_it_answers(story: Story) -> None:
    lines = asked(story.undisturbed)
    assert [line["step"] for line in lines] == [0, 20, 40, STEPS]
    assert lines[0]["accuracy"] == lines[0][f"pass_at_{SAMPLES}"] == 0
    assert lines[-1]["accuracy"] == lines[-1]["pass_at_1"] == lines[-1][f"pass_at_{SAMPLES}"] == 1
    assert lines[-1]["cut_off_fraction"] == 0
    for line in lines:
        assert line["accuracy"] == line["pass_at_1"] <= line[f"pass_at_{SAMPLES}"]
        assert (line["num_questions"], line["num_samples"]) == (len(COLOURS), SAMPLES * len(COLOURS))
        assert 0 <= line["accuracy_standard_error"] < 0.5


def test_a_job_whose_services_were_killed_has_exactly_the_same_figures_and_answers(story: Story) -> None:
    assert story.disturbed.record() == story.undisturbed.record()
    answers = [
        {path.name: path.read_text() for path in (job.output / "answers").iterdir()}
        for job in (story.undisturbed, story.disturbed)
    ]
    assert answers[0] == answers[1]
    assert sorted(answers[0]) == [f"step-{step:08d}.jsonl" for step in (0, 20, 40, STEPS)]


def test_a_server_that_comes_back_in_an_evaluation_gets_the_student_again(story: Story) -> None:
    (again,) = [event["to"] for event in story.first.events("weights published again") if event["to"]]
    assert again == [story.rollouts.address]


def test_every_response_is_kept_with_its_verdict(story: Story) -> None:
    path = story.undisturbed.output / "answers" / f"step-{STEPS:08d}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["answers"] for line in lines] == [[colour] for colour in COLOURS.values()]
    for line, colour in zip(lines, COLOURS.values(), strict=True):
        assert line["right"] == SAMPLES
        assert [response["text"] for response in line["responses"]] == [colour] * SAMPLES


def test_questions_change_nothing_of_what_is_trained(story: Story) -> None:
    losses = [[step["loss_nats_per_token"] for step in job.steps()] for job in (story.unasked, story.undisturbed)]
    assert losses[0] == losses[1][:25]


def evaluate(story: Story, processes: Processes, *arguments: str) -> Process:
    """`kdmesh evaluate` with the job's own questions."""
    config = str(story.disturbed.config)
    return processes.start("evaluate", story.disturbed.config.parent, KDMESH, "evaluate", config, *arguments)


def test_a_served_model_is_asked_the_same_as_in_the_run(story: Story, processes: Processes, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    evaluating = evaluate(story, processes, "--rollout", story.rollouts.address, "--output", str(output))
    evaluating.succeed()
    (sentence,) = evaluating.words()
    assert sentence.startswith(f"{SAMPLES * len(COLOURS)} answers to {len(COLOURS)} questions: right 100.0%")
    figures = json.loads(evaluating.log.read_text().splitlines()[-1])
    last = asked(story.disturbed)[-1]
    assert figures == {name: last[name] for name in figures}
    kept = story.disturbed.output / "answers" / f"step-{STEPS:08d}.jsonl"
    assert output.read_text() == kept.read_text()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluation.questions.answer=label"], "no column 'label', which evaluation.questions.answer names"),
        (["evaluation.questions.match={name: last_number}"], "the answer 'red' holds no number"),
        (
            ["evaluation.questions.match={name: custom, target: 'tests.system.test_evaluation:closely'}"],
            "missing params: distance",
        ),
    ],
)
def test_questions_that_cannot_be_used_are_refused_before_anything_is_loaded(
    recipe: Recipe, processes: Processes, tmp_path: Path, overrides: list[str], words: str
) -> None:
    job = learning_by_heart(processes, tmp_path / "job", recipe, evaluation=evaluation(recipe.data, ["127.0.0.1:1"]))
    trainer = job.start(*overrides)
    assert trainer.exit_code() == 2
    (sentence,) = trainer.words()
    assert words in sentence
    assert not trainer.events("student loaded")


def closely(response: str, row: Mapping[str, Any], *, distance: int) -> bool:
    return abs(len(response) - len(row["answer"])) <= distance


def test_a_job_whose_questions_nobody_answers_ends_with_the_reason_on_every_rank(
    recipe: Recipe, processes: Processes, tmp_path: Path
) -> None:
    rollouts = Rollouts(processes, tmp_path / "rollouts", recipe.student, can_be_held=True)
    section = evaluation(recipe.data, [rollouts.address])
    section["rollouts"]["deadline_s"] = 8
    job = learning_by_heart(processes, tmp_path / "job", recipe, evaluation=section)
    rollouts.start()
    rollouts.wait_ready()
    rollouts.hold()
    trainer = job.start_ranks(2)
    trainer.until(lambda: rollouts.num_waiting() >= 8)
    rollouts.process.signal(signal.SIGKILL)
    assert trainer.exit_code() == 3
    sentences = [line for line in trainer.words() if rollouts.address in line]
    assert len(sentences) == 1


def test_another_server_answers_for_one_that_is_gone(
    story: Story, recipe: Recipe, processes: Processes, tmp_path: Path
) -> None:
    gone, stays = (Rollouts(processes, tmp_path / name, recipe.student, can_be_held=True) for name in ("gone", "stays"))
    section = evaluation(recipe.data, [gone.address, stays.address])
    job = learning_by_heart(processes, tmp_path / "job", recipe, evaluation=section, steps=2)
    for server in (gone, stays):
        server.start()
    for server in (gone, stays):
        server.wait_ready()
    gone.hold()
    trainer = job.start_ranks(2)
    trainer.until(lambda: gone.num_waiting() >= 4)
    gone.process.signal(signal.SIGKILL)
    trainer.succeed()
    kept = [run.output / "answers" / "step-00000000.jsonl" for run in (job, story.undisturbed)]
    assert kept[0].read_text() == kept[1].read_text()
