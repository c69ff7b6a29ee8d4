"""`kdmesh evaluate --openai` asks any model behind an OpenAI API the questions of a run, and grades what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kdmesh.commands import cli
from kdmesh.images import encoded, noise_image
from tests.support.openai_runs import write
from tests.support.openai_server import MODEL, Answer, OpenAIServer, answer_of, openai_server, said
from tests.support.trainer_jobs import write_config

FILTERED = Answer(400, {"error": {"message": "no", "code": "content_filter"}})


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with openai_server() as running:
        yield running


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run's, with three questions; there is no model."""
    path = write(tmp_path / "questions.jsonl", *({"question": f"what is {i}", "answer": i} for i in range(3)))
    questions = {"path": str(path), "match": {"name": "last_number"}, "sampling": {"max_new_tokens": 9}}
    evaluation = {"questions": questions, "rollouts": {}}
    return write_config(tmp_path, student=tmp_path / "student", teacher="a:1", steps=1, evaluation=evaluation)


def run(server: OpenAIServer, config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    where = ("--openai", server.url, "--model-name", MODEL)
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    command = (sys.executable, "-c", "from kdmesh.entry import main; main()", "evaluate", str(config), *where, *options)
    return subprocess.run(command, capture_output=True, text=True, cwd=config.parent, env=environment, timeout=100)


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_question_is_asked_as_the_run_asks_it_and_graded(server: OpenAIServer, config: Path) -> None:
    server.choices = {
        "what is 0": [said("It is 0")],
        "what is 1": [said("It is 7.", reasoning_content="it is 1")],
        "what is 2": [said("2, 3, 4, 5, ", finish_reason="length")],
    }
    found = figures(run(server, config, "--output", str(config.with_name("answers.jsonl")), "--concurrency", "1"))
    assert (found["accuracy"], found["cut_off_fraction"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert (found["num_questions"], found["num_samples"], found["response_tokens_mean"]) == (3, 3, 3)
    seeds = [body.pop("seed") for body in server.asked]
    assert len(set(seeds)) == 3
    assert server.asked == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"what is {number}"}],
            "max_tokens": 9,
            "temperature": 0.0,
            "top_p": 1.0,
        }
        for number in range(3)
    ]
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in config.with_name("answers.jsonl").read_text().splitlines()
    ]
    assert [(row["asked"], row["answers"], row["right"]) for row in rows] == [
        ("what is 0", ["0"], 1),
        ("what is 1", ["1"], 0),
        ("what is 2", ["2"], 0),
    ]
    assert rows[2]["responses"] == [{"text": "2, 3, 4, 5, ", "is_right": False, "is_cut_off": True, "tokens": 3}]


def test_samples_are_drawn_by_seeds_of_their_own_and_as_the_run_draws_them(server: OpenAIServer, config: Path) -> None:
    sampling = "{temperature: 0.7, top_k: 20, min_p: 0.1, repetition_penalty: 1.1, stop_strings: ['#']}"
    settings = {
        "evaluation.questions.samples": "4",
        "evaluation.questions.pass_at": "[1, 4]",
        "evaluation.questions.sampling": sampling,
        "evaluation.questions.limit": "2",
        "data.chat_template_settings": "{enable_thinking: false}",
    }
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    output = config.with_name("answers.jsonl")
    found = figures(run(server, config, *sets, "--output", str(output), "--request-field", "reasoning_effort=low"))
    assert {"pass_at_1", "pass_at_4"} < found.keys()
    assert len({body["seed"] for body in server.asked}) == len(server.asked) == 8
    body = server.asked[0]
    drawn = {"temperature": 0.7, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "stop": ["#"]}
    own = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    assert (drawn | own).items() <= body.items()
    texts = [response["text"] for line in output.read_text().splitlines() for response in json.loads(line)["responses"]]
    in_order = sorted(server.asked, key=lambda body: (body["messages"][0]["content"], body["seed"]))
    assert texts == [answer_of(body, 0) for body in in_order]


def test_a_question_that_is_filtered_counts_as_wrong(server: OpenAIServer, config: Path) -> None:
    (config.parent / "my_grader.py").write_text("def accepts(response, row): return True\n")
    server.choices = {f"what is {i}": [said(str(i))] for i in range(2)}
    server.choices["what is 2"] = [said("2 and so", finish_reason="content_filter")]
    server.refused = {"what is 1": FILTERED}
    for more in ((), ("--set", "evaluation.questions.match={name: custom, target: 'my_grader:accepts'}")):
        assert figures(run(server, config, *more))["accuracy"] == pytest.approx(1 / 3)


def test_a_question_that_is_refused_ends_it_and_is_named(server: OpenAIServer, config: Path) -> None:
    server.refused = {"what is 1": Answer(400, {"error": {"message": "too long"}})}
    output = config.with_name("answers.jsonl")
    result = run(server, config, "--output", str(output))
    assert result.returncode == 2
    assert f"{config.with_name('questions.jsonl')}:2: {server.url} answers 400: too long" in result.stderr
    assert not output.exists()


def test_what_was_answered_before_a_question_is_refused_is_kept(server: OpenAIServer, config: Path) -> None:
    server.refused = {"what is 1": Answer(400, {"error": {"message": "too long"}})}
    output = config.with_name("answers.jsonl")
    sampled = ("--set", "evaluation.questions.samples=2", "--set", "evaluation.questions.sampling.temperature=1")
    done = run(server, config, "--output", str(output), "--concurrency", "1", *sampled)
    kept = output.with_name("answers.jsonl.incomplete")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"questions with all their answers, 1 of them, are in {kept}" in done.stderr
    [row] = [json.loads(line) for line in kept.read_text().splitlines()]
    assert (row["asked"], len(row["responses"])) == ("what is 0", 2)
    assert not output.exists()


def test_answers_that_cannot_be_written_at_the_end_stay_beside(server: OpenAIServer, config: Path) -> None:
    output = config.with_name("answers.jsonl")
    output.with_name("answers.jsonl.part").mkdir()  # what it would be written by
    done = run(server, config, "--output", str(output))
    kept = output.with_name("answers.jsonl.incomplete")
    assert done.returncode == 2
    assert json.loads(done.stdout.splitlines()[-1])["num_questions"] == 3
    assert f"questions with all their answers, 3 of them, are in {kept}" in done.stderr
    assert sorted(json.loads(line)["asked"] for line in kept.read_text().splitlines()) == [
        f"what is {i}" for i in range(3)
    ]
    output.with_name("answers.jsonl.part").rmdir()
    figures(run(server, config, "--output", str(output)))
    assert len(output.read_text().splitlines()) == 3
    assert not kept.exists()


def test_a_grader_that_fails_is_told_of_and_counts_as_wrong(server: OpenAIServer, config: Path) -> None:
    (config.parent / "my_grader.py").write_text("def fails(response, row): return 1 / 0\n")
    result = run(server, config, "--set", "evaluation.questions.match={name: custom, target: 'my_grader:fails'}")
    found = figures(result)
    assert (found["accuracy"], found["grader_errors"]) == (0, 3)
    assert "the grader failed, so these answers count as wrong" in result.stderr


def test_images_of_questions_are_sent(server: OpenAIServer, config: Path) -> None:
    (config.parent / "it.png").write_bytes(encoded(noise_image(8, 6, seed=0)))
    seen = {"role": "user", "content": [{"type": "image", "image": "it.png"}, {"type": "text", "text": "what is it"}]}
    path = write(config.with_name("seen.jsonl"), {"messages": [seen], "answer": 1})
    figures(run(server, config, "--set", f"evaluation.questions={{path: {path}, messages: messages}}"))
    [image, text] = server.asked[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "what is it"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rollout", "a:1"), "--rollout does not go with --openai"),
        (("--model-name", "other"), "The model `other` does not exist"),
        (("--request-field", "messages=[]"), "'messages' is no field that can be set"),
        (("--request-field", "seed=5"), "seed=5 would make all samples of a prompt the same"),
        (("--set", "evaluation.questions=null", "--set", "evaluation.rollouts=null"), "there is nothing to ask"),
    ],
)
def test_what_cannot_be_is_refused(server: OpenAIServer, config: Path, options: tuple[str, ...], words: str) -> None:
    done = run(server, config, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--openai", "http://localhost:1/v1"), "--openai needs --model-name"),
        (("--model-name", "m"), "--model-name goes only with --openai"),
        (("--access", "access.yaml"), "--access goes only with --openai"),
    ],
)
def test_options_of_the_other_kind_are_refused(config: Path, options: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(cli.main, ["evaluate", str(config), *options])
    assert result.exit_code == 2
    assert words in result.output
