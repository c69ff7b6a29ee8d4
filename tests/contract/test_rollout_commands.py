"""Runs the rollout server and `kdmesh generate` as commands, over a real tiny model."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from kdmesh.answering.chat_tokens import ChatTokens
from kdmesh.commands import cli
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.sampling.seeds import seed_of
from kdmesh.types import Sampling
from kdmesh_rollout import config
from kdmesh_rollout.engine import Order
from kdmesh_rollout.transformers_engine import TransformersEngine
from tests.support.teacher_process import TeacherProcess, await_ready, started
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import check_answers_can_be_learnt, write_chats

KDMESH = ("-c", "from kdmesh.commands.cli import main; main()")


def write_yaml(directory: Path, model: Path, **engine: Any) -> Path:
    tree = {
        "engine": {"kind": "transformers", "model": str(model), "device": "cpu", "deterministic": True} | engine,
        "server": {"port": 0, "rest_port": 0, "drain_s": 5},
    }
    path = directory / "rollout.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models.path(seed=5)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    directory = tmp_path_factory.mktemp("rollout")
    path = write_yaml(directory, model)
    command = (*KDMESH, "rollout", str(path), "--set", "engine.threads=1")
    with started(directory, *command) as process:
        yield await_ready(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def test_a_served_models_samples_are_those_of_its_engine(server: TeacherProcess, model: Path) -> None:
    engine = TransformersEngine(config.TransformersEngine(model=model, device="cpu", deterministic=True))
    described = engine.load()
    ids = np.arange(3, 20, dtype=np.int32)
    sampling = Sampling(max_new_tokens=16, temperature=0.9, top_p=0.95)
    for key in range(4):
        engine.add(Order(key=key, prompt_ids=ids, sampling=sampling, seed=11 + key))
    expected = {}
    while engine.num_running:
        expected |= {one.key: one.sample for one in engine.step()}
    with RolloutPool([server.grpc], job="test", deadline_s=20) as pool:
        assert pool.describe().architecture_fingerprint == described.architecture_fingerprint
        assert pool.describe().is_deterministic
        samples = pool.submit(ids, sampling, num_samples=4, seed=11).wait()
    for key, sample in enumerate(samples):
        assert sample.token_ids.tolist() == expected[key].token_ids.tolist()
        np.testing.assert_allclose(sample.logprobs, expected[key].logprobs, atol=1e-5)


def test_generate_writes_a_chat_dataset_of_the_models_answers(
    server: TeacherProcess, model: Path, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "forget this"}]
    rows = [{"messages": chat}, {"prompt": "and this"}]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "new" / "answers.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--samples", "2", "--max-new-tokens", "12", "--keep-cut-off", "--seed", "3")
    where = ("--rollout", server.grpc, "--model", str(model), "--prompts", str(prompts), "--output", str(output))
    result = run("generate", *where, *options)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("4 answers to 2 prompts; ")
    written = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    assert [turns[:-1] for turns in written] == [chat[:1]] * 2 + [[{"role": "user", "content": "and this"}]] * 2

    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    text = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    sampling = Sampling(max_new_tokens=12, stop_token_ids=(tokenizer.eos_token_id,))
    seed = seed_of("generate", 3, 0)
    with RolloutPool([server.grpc], job="test", deadline_s=20) as pool:
        answers = [s.token_ids.tolist() for s in pool.submit(ids, sampling, num_samples=2, seed=seed).wait()]
    for turns, answer in zip(written, answers, strict=False):
        assert turns[-1] == {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)}

    again = (*where, *options[:-1], "4")
    result = run("generate", *again)
    assert (result.exit_code, f"--output {output} is there already" in result.output) == (2, True), result.output
    assert [json.loads(line)["messages"] for line in output.read_text().splitlines()] == written
    assert run("generate", *again, "--overwrite").exit_code == 0
    assert [json.loads(line)["messages"] for line in output.read_text().splitlines()] != written


def test_a_text_that_ends_an_answer_is_left_out_of_it(server: TeacherProcess, model: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "say it"}\n')
    where = ("--rollout", server.grpc, "--model", str(model), "--prompts", str(prompts), "--output", str(output))
    how = ("--max-new-tokens", "24", "--keep-cut-off", "--seed", "5", "--overwrite")
    assert run("generate", *where, *how).exit_code == 0
    [whole] = [json.loads(line)["messages"][-1]["content"] for line in output.read_text().splitlines()]
    stop = next(letter for letter in whole[2:] if letter.isascii() and letter not in whole[:2])
    result = run("generate", *where, *how, "--stop", stop)
    assert result.exit_code == 0, result.output
    [ended] = [json.loads(line)["messages"][-1]["content"] for line in output.read_text().splitlines()]
    assert ended == whole[: whole.index(stop)]


def test_a_dataset_without_an_answer_is_not_written(server: TeacherProcess, model: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "say it"}\n')
    where = ("--rollout", server.grpc, "--model", str(model), "--prompts", str(prompts), "--output", str(output))
    result = run("generate", *where, "--max-new-tokens", "1", "--samples", "2", "--seed", "1")
    assert result.exit_code == 2
    assert "2 answers reached the length limit; give a larger --max-new-tokens, or --keep-cut-off" in result.output
    assert list(tmp_path.iterdir()) == [prompts]


def test_a_blank_answer_is_left_out_and_counted(
    server: TeacherProcess, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "say it"}\n')
    said = iter(["so", " \n", "", "\n", ""])
    monkeypatch.setattr(ChatTokens, "text", lambda chats, sample, stops: next(said))
    where = ("--rollout", server.grpc, "--model", str(model), "--prompts", str(prompts), "--output", str(output))
    how = ("--max-new-tokens", "4", "--keep-cut-off")
    result = run("generate", *where, *how, "--samples", "3")
    assert result.exit_code == 0, result.output
    assert "2 were blank and left out" in result.output
    assert [json.loads(line)["messages"][-1]["content"] for line in output.read_text().splitlines()] == ["so"]
    result = run("generate", *where, *how, "--samples", "2", "--overwrite")
    assert (result.exit_code, "no answer is left: 2 were blank" in result.output) == (2, True), result.output
    assert len(output.read_text().splitlines()) == 1


def test_a_student_learns_from_the_text_of_a_teacher_that_a_rollout_server_serves(
    server: TeacherProcess, model: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    prompts, output = write_chats(tmp_path / "prompts.jsonl", 24, seed=7), tmp_path / "answers.jsonl"
    where = ("--rollout", server.grpc, "--model", str(model), "--prompts", str(prompts), "--output", str(output))
    result = run("generate", *where, "--temperature", "0", "--max-new-tokens", "8", "--keep-cut-off")
    assert result.exit_code == 0, result.output
    student = tiny_models.path("qwen3", seed=6, hidden_size=24)
    check_answers_can_be_learnt(output, tmp_path, student=student, steps=30)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"text": "hello"}', "line 1 has neither `messages`, a list of turns, nor `prompt`, a text"),
        ('{"messages": [{"role": "assistant", "content": "hello"}]}', "line 1 has no turn to answer"),
    ],
)
def test_a_row_that_is_no_prompt_is_named_and_nothing_is_written(
    server: TeacherProcess, model: Path, tmp_path: Path, row: str, message: str
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(row + "\n")
    where = ("--rollout", server.grpc, "--model", str(model), "--prompts", str(prompts), "--output", str(output))
    result = run("generate", *where)
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == [prompts]


def test_another_tokenizer_than_the_servers_is_refused(
    server: TeacherProcess, tiny_models: TinyModels, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    other = tmp_path / "other"
    other.mkdir()
    tokenizer = load_tokenizer(tiny_models.path())
    assert tokenizer is not None
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(other)
    where = ("--rollout", server.grpc, "--model", str(other), "--prompts", str(prompts))
    result = run("generate", *where, "--output", str(tmp_path / "answers.jsonl"))
    assert result.exit_code == 2
    assert "the servers have tokenizer" in result.output


def test_a_port_in_use_and_a_bad_configuration_are_named(tmp_path: Path, model: Path) -> None:
    path = str(write_yaml(tmp_path, model))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with started(tmp_path, *KDMESH, "rollout", path, "--set", f"server.port={port}") as process:
            stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in stderr
    assert "model loaded" not in stderr
    with started(tmp_path, "-m", "kdmesh_rollout", path, "--check", "--set", "engine.max_runing=1") as process:
        stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert "engine.max_runing: there is no such key for transformers" in stderr
