"""Whole jobs on a blend of datasets whose token ids lie in files: killed, continued, and on samples of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.teacher_process import wait_event
from tests.support.tiny_models import TinyModels
from tests.support.token_caches import entries
from tests.support.trainer_jobs import losses, records, run_job, serving_teacher, started_job, write_chats, write_config
from tests.support.trainer_ranks import finish

pytestmark = pytest.mark.slow

STEPS = 16
BATCH = {"sequences": 5, "max_tokens": 192}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A student, and a server of its teacher."""

    student: Path
    teacher: str | None  # host:port; None: there is no server

    def config(self, directory: Path, *, token_cache: Path | None, **sections: Any) -> Path:
        """A job that draws four of five sequences from the first dataset."""
        cache = None if token_cache is None else {"directory": str(token_cache), "workers": 1}
        train = {
            "format": "blend",
            "datasets": {
                name: {
                    "format": "chat",
                    "path": str(write_chats(directory / f"{name}.jsonl", count, seed=count)),
                    "weight": weight,
                }
                for name, count, weight in (("words", 30, 0.8), ("more", 7, 0.2))
            },
        }
        return write_config(
            directory,
            student=self.student,
            teacher=self.teacher,
            steps=STEPS,
            data={"train": train, "max_tokens": 128, "token_cache": cache},
            batch=BATCH,
            checkpoint={"every": 4, "keep": 1},
            **sections,
        )


@pytest.fixture(scope="module")
def pair(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    teacher = tiny_models.path("qwen3", seed=2, hidden_size=48, vocab_size=336)
    with serving_teacher(tmp_path_factory.mktemp("teacher"), teacher) as address:
        yield Pair(student=tiny_models.path("qwen3", seed=1, tie_word_embeddings=True), teacher=address)


def drawn(run: Path) -> list[dict[str, int]]:
    """Of every step, the sequences of each dataset."""
    key = "dataset_sequences."
    return [
        {name.removeprefix(key): count for name, count in step.items() if name.startswith(key)}
        for step in records(run, "step")
    ]


def test_a_job_without_a_teacher_trains_on_a_blend_in_its_proportions(tiny_models: TinyModels, tmp_path: Path) -> None:
    alone = Pair(student=tiny_models.path("qwen3", seed=1, tie_word_embeddings=True), teacher=None)
    config = alone.config(tmp_path, token_cache=tmp_path / "tokens", objective={"name": "sft"})
    (outcome,) = run_job(config)
    assert outcome.exit_code == 0, outcome.errors
    assert len(entries(tmp_path / "tokens")) == 2
    steps = drawn(tmp_path / "run")
    assert all(sum(step.values()) == BATCH["sequences"] for step in steps)
    assert sum(map(Counter, steps), Counter()) == {"words": 64, "more": 16}


def test_a_killed_job_that_maps_its_tokens_ends_as_the_undisturbed_one_in_memory(pair: Pair, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = pair.config(tmp_path / "whole", token_cache=None)
    for outcome in run_job(whole, ranks=2):
        assert outcome.exit_code == 0, outcome.errors
    killed = pair.config(tmp_path / "killed", token_cache=tmp_path / "tokens")
    with started_job(killed, ranks=2) as ranks:
        wait_event(ranks[0], "checkpoint written")
        for rank in ranks:
            rank.kill()
        assert [outcome.exit_code for outcome in finish(ranks)] == [-signal.SIGKILL] * 2
    assert len(losses(tmp_path / "killed" / "run")) < STEPS
    for outcome in run_job(killed, ranks=2):
        assert outcome.exit_code == 0, outcome.errors
    assert losses(tmp_path / "killed" / "run") == losses(tmp_path / "whole" / "run")
    assert drawn(tmp_path / "killed" / "run") == drawn(tmp_path / "whole" / "run")
    (refused,) = run_job(killed, "data.train.datasets.more.weight=0.3")
    assert refused.exit_code == 2
    assert "data.train (weights) is more 3/11, words 8/11 now and was more 1/5, words 4/5" in refused.errors


def test_a_job_finds_what_was_tokenised_before_it(tiny_models: TinyModels, tmp_path: Path) -> None:
    alone = Pair(student=tiny_models.path("qwen3", seed=1, tie_word_embeddings=True), teacher=None)
    config = alone.config(tmp_path, token_cache=tmp_path / "tokens", objective={"name": "sft"})
    kdmesh = str(Path(sys.executable).with_name("kdmesh"))
    done = subprocess.run([kdmesh, "tokenize", str(config)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = [path.stat().st_ino for path in entries(tmp_path / "tokens")]
    assert len(made) == 2
    (outcome,) = run_job(config, "steps=1")
    assert outcome.exit_code == 0, outcome.errors
    assert [path.stat().st_ino for path in entries(tmp_path / "tokens")] == made
    refused = subprocess.run(
        [kdmesh, "tokenize", str(config), "--set", "data.token_cache=null"], check=False, capture_output=True, text=True
    )
    assert (refused.returncode, refused.stderr.strip()) == (
        2,
        "Error: there is no data.token_cache, so the trainer keeps token ids in memory",
    )


def test_a_bad_line_refuses_the_job_on_every_rank(pair: Pair, tmp_path: Path) -> None:
    config = pair.config(tmp_path, token_cache=tmp_path / "tokens")
    with (tmp_path / "more.jsonl").open("a") as file:
        file.write('\n{"messages": 3}\n')
    outcomes = run_job(config, ranks=2)
    assert [outcome.exit_code for outcome in outcomes] == [2, 2]
    said = "".join(outcome.errors for outcome in outcomes)
    assert "more.jsonl:8: messages must be a list of messages, not int" in said
    assert not list((tmp_path / "tokens").glob("*.writing"))
