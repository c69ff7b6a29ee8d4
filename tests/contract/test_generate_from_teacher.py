"""A teacher is sampled from through its rows alone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from kdmesh import cli
from kdmesh.errors import InvalidRequest
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.rpc.teacher_pool import TeacherPool
from kdmesh.sampling.teacher_sampler import TeacherSampler
from kdmesh.types import FinishReason, Sampling
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
            processes[package] = stack.enter_context(started(directory, "-m", package, str(path)))
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


@pytest.mark.parametrize("servers_named", [(), ("--rollout", "127.0.0.1:1", "--teacher", "127.0.0.1:1")])
def test_servers_of_one_kind_must_be_named(tmp_path: Path, servers_named: tuple[str, ...]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("")
    where = ("--model", str(tmp_path), "--prompts", str(prompts), "--output", str(tmp_path / "answers.jsonl"))
    result = run(*servers_named, *where)
    assert result.exit_code == 2
    assert "servers of one kind" in result.output
