"""A teacher is sampled from through its rows alone."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from kdmesh.answering import kdmesh_servers
from kdmesh.answering.chat_tokens import ChatTokens
from kdmesh.answering.kdmesh_servers import TokenAnswers
from kdmesh.commands import cli
from kdmesh.errors import InvalidRequest
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.rpc.fleet import told_waiting
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.sampling.teacher_sampler import TeacherSampler
from kdmesh.types import FinishReason, Sampling
from tests.support.copies import serving
from tests.support.teacher_process import TeacherProcess, await_ready, started
from tests.support.tiny_models import TinyModels


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models.path(seed=5)


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TeacherProcess]]:
    """A teacher and a rollout server of the same model."""
    engine = {"kind": "transformers", "model": str(model), "device": "cpu", "deterministic": True, "threads": 1}
    trees: dict[str, dict[str, Any]] = {
        "kdmesh_teacher": {"engine": engine | {"max_batch_tokens": 256}, "slab": {"slots": 4, "slot_mib": 1}},
        "kdmesh_rollout": {"engine": engine},
    }
    with ExitStack() as stack:
        processes = {}
        for package, tree in trees.items():
            directory = tmp_path_factory.mktemp(package)
            path = directory / "server.yaml"
            path.write_text(yaml.safe_dump(tree | {"server": {"port": 0, "rest_port": 0, "drain_s": 5}}))
            processes[package] = stack.enter_context(serving(package, path))
        yield {package: await_ready(process) for package, process in processes.items()}
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["generate", *arguments])


def test_a_teacher_gives_the_answers_of_a_rollout_server(
    servers: dict[str, TeacherProcess], model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"say {word}"} for word in ("it", "that again", "nothing")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--samples", "3", "--max-new-tokens", "12", "--keep-cut-off", "--seed", "3", "--top-p", "0.95")
    written = []
    for package, kind in (("kdmesh_rollout", "--rollout"), ("kdmesh_teacher", "--teacher")):
        output = tmp_path / f"{package}.jsonl"
        where = ("--model", str(model), "--prompts", str(prompts), "--output", str(output))
        result = run(kind, servers[package].grpc, *where, *options)
        assert result.exit_code == 0, result.output
        assert result.output.startswith("9 answers to 3 prompts; ")
        written.append(output.read_text())
    assert written[0] == written[1]
    assert len(set(written[0].splitlines())) == 9


def test_an_interrupted_dataset_is_continued_where_it_was(
    servers: dict[str, TeacherProcess], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"say {number}", "system": "Be brief"} for number in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--rollout", servers["kdmesh_rollout"].grpc, "--model", str(model), "--prompts", str(prompts))
    options += ("--samples", "2", "--max-new-tokens", "8", "--keep-cut-off")
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert run(*options, "--output", str(whole)).exit_code == 0
    written = whole.read_text().splitlines()
    assert [json.loads(line)["messages"][0] for line in written] == [{"role": "system", "content": "Be brief"}] * 12

    part = tmp_path / "answers.jsonl.part"
    text = ChatTokens.text
    asked = 0

    def failing(chats: Any, *arguments: Any) -> str:
        nonlocal asked
        asked += 1
        if asked == 7:
            raise KeyboardInterrupt
        return text(chats, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ChatTokens, "text", failing)
        result = run(*options, "--output", str(output))
    assert result.exit_code == 130
    assert f"The answers to 3 prompts are kept in {part}" in result.output
    assert not output.exists()
    part.write_text(part.read_text().replace("Be brief", "Be brisk", 1))  # in one of the three lines
    with part.open("a") as file:
        file.write('{"rows": [')  # killed while it wrote

    result = run(*options, "--output", str(output), "--seed", "1")
    assert result.exit_code == 2
    assert "holds answers to something else (seed differ)" in result.output
    result = run(*options, "--output", str(output))
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Damaged in {part}: 1 line of answers, to prompts that are asked again.\n")
    assert "Going on behind 2 prompts" in result.output
    assert "12 answers to 6 prompts" in result.output
    assert output.read_text() == whole.read_text()
    assert not part.exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "tools": [{"name": "f"}]}, "line 3: the chat template leaves out its tools"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "2"}]},
            "line 3: the chat template leaves out its tools, or calls of them",
        ),
        ({"prompt": "so " * 600}, r"line 3: the prompt has \d+ tokens; with a response, the servers take at most 256"),
        ({"messages": []}, "line 3 has no turn to answer"),
    ],
)
def test_a_bad_row_is_refused_before_anything_is_asked(
    servers: dict[str, TeacherProcess],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setattr(TokenAnswers, "answers", lambda *arguments: pytest.fail("something was asked"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(each) + "\n" for each in ({"prompt": "a"}, {"prompt": "b"}, row)))
    output = tmp_path / "answers.jsonl"
    where = ("--model", str(model), "--prompts", str(prompts), "--output", str(output))
    result = run("--rollout", servers["kdmesh_rollout"].grpc, *where)
    assert result.exit_code == 2, result.output
    assert re.search(words, result.output)
    assert list(tmp_path.iterdir()) == [prompts]


def test_a_sample_ends_at_a_stop_string_or_where_the_teacher_ends(
    servers: dict[str, TeacherProcess], model: Path
) -> None:
    tokenizer = load_tokenizer(model)
    assert tokenizer is not None

    def decode(ids: Any) -> str:
        return str(tokenizer.decode(ids))

    ids = np.arange(3, 20, dtype=np.int32)
    with TeacherPool([servers["kdmesh_teacher"].grpc], job="test", deadline_s=20) as pool:
        sampler = TeacherSampler(pool, decode)
        [plain] = sampler.submit(ids, Sampling(max_new_tokens=8), num_samples=1, seed=2).wait()
        text = decode(plain.token_ids[3:5].tolist())
        stopping = sampler.submit(ids, Sampling(max_new_tokens=8, stop_strings=(text,)), num_samples=1, seed=2)
        long = sampler.submit(np.resize(ids, 250), Sampling(max_new_tokens=20), num_samples=2, seed=0)
        for sample in long.wait():  # the later request is drawn with the other
            assert (sample.num_tokens, sample.finish_reason) == (6, FinishReason.LENGTH)
        [stopped] = stopping.wait()
        assert stopped.finish_reason is FinishReason.STOP
        assert stopped.token_ids.tolist() == plain.token_ids[: stopped.num_tokens].tolist()
        assert text in decode(stopped.token_ids.tolist())
        with pytest.raises(InvalidRequest, match=r"the prompt has 256 tokens; with a response, .* at most 256"):
            sampler.submit(np.resize(ids, 256), Sampling(max_new_tokens=1), num_samples=1, seed=0)


def test_a_server_that_is_not_there_is_named_soon_and_nothing_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(told_waiting, "_FIRST_S", 0.2)
    monkeypatch.setattr(kdmesh_servers, "_CONNECT_S", 1.0)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}')
    where = ("--model", str(model), "--prompts", str(prompts), "--output", str(tmp_path / "answers.jsonl"))
    for kind, name in (("--rollout", "rollout server"), ("--teacher", "teacher")):
        caplog.clear()
        result = run(kind, "127.0.0.1:1", *where)
        assert result.exit_code == 3
        assert re.search(rf"no {name} is ready within 1 s \(127.0.0.1:1: ", result.output), result.output
        waited = [record for record in caplog.records if record.getMessage() == "waiting for a server"]
        assert [(record.__dict__["kind"], record.__dict__["address"]) for record in waited] == [(name, "127.0.0.1:1")]
        assert "127.0.0.1:1" in waited[0].__dict__["reason"]
    assert list(tmp_path.iterdir()) == [prompts]


def test_a_server_of_the_other_kind_is_refused_at_once(
    servers: dict[str, TeacherProcess], model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}')
    where = ("--model", str(model), "--prompts", str(prompts), "--output", str(tmp_path / "answers.jsonl"))
    for kind, other, name in (
        ("--rollout", "kdmesh_teacher", "rollout server"),
        ("--teacher", "kdmesh_rollout", "teacher server"),
    ):
        address = servers[other].grpc
        result = run(kind, address, *where)
        assert result.exit_code == 2
        assert f"{address} is not a {name}: the server there is of another kind" in result.output


def test_sigterm_leaves_no_file_without_an_answer(model: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "a"}')
    where = ("--rollout", "127.0.0.1:1", "--model", str(model), "--prompts", str(prompts), "--output", str(output))
    with started(tmp_path, "-c", "from kdmesh.commands.cli import main; main()", "generate", *where) as process:
        assert process.stderr is not None
        assert any("waiting for a server" in line for line in process.stderr)
        assert (tmp_path / "answers.jsonl.part").exists()
        process.send_signal(signal.SIGTERM)
        process.communicate()  # one that went on waiting would do so for longer than a test may take
        assert process.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "answers.jsonl.part").exists()


@pytest.mark.parametrize("servers_named", [(), ("--rollout", "127.0.0.1:1", "--teacher", "127.0.0.1:1")])
def test_servers_of_one_kind_must_be_named(tmp_path: Path, servers_named: tuple[str, ...]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("")
    where = ("--model", str(tmp_path), "--prompts", str(prompts), "--output", str(tmp_path / "answers.jsonl"))
    result = run(*servers_named, *where)
    assert result.exit_code == 2
    assert "servers of one kind" in result.output
