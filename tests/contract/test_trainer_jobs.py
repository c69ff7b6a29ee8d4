"""Whole jobs against a real teacher server: distil, stop, die, go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.teacher_process import wait_event
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import (
    checkpoint_steps,
    evaluations,
    losses,
    records,
    run_job,
    serving_teacher,
    started_job,
    write_config,
)
from tests.support.trainer_ranks import finish

STEPS = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A student, and a server of its teacher."""

    student: Path
    teacher: str  # host:port
    teacher_model: Path

    def config(self, directory: Path) -> Path:
        """A job that takes STEPS steps, with a checkpoint every 4."""
        return write_config(
            directory,
            student=self.student,
            teacher=self.teacher,
            steps=STEPS,
            optimizer={"learning_rate": 0.01, "warmup_steps": 2},
            evaluation={"every": 10},
            checkpoint={"every": 4, "keep": 1},
        )


@pytest.fixture(scope="module")
def pair(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    # Another size, another padding of the vocabulary: only the tokenizer is the same.
    teacher = tiny_models.path("qwen3", seed=2, hidden_size=48, vocab_size=336)
    with serving_teacher(tmp_path_factory.mktemp("teacher"), teacher) as address:
        yield Pair(
            student=tiny_models.path("qwen3", seed=1, tie_word_embeddings=True), teacher=address, teacher_model=teacher
        )


@pytest.fixture(scope="module")
def whole_run(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run on two ranks that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    for outcome in run_job(pair.config(directory), ranks=2):
        assert outcome.exit_code == 0, outcome.errors
    return directory / "run"


def test_a_job_distils_judges_and_writes_its_model(whole_run: Path, pair: Pair) -> None:
    assert list(losses(whole_run)) == list(range(STEPS))
    scores = evaluations(whole_run)
    assert list(scores) == [0, 10, 20, STEPS]
    assert scores[STEPS]["kl_nats_per_token"] < 0.7 * scores[0]["kl_nats_per_token"]
    assert AutoModelForCausalLM.from_pretrained(whole_run / "final").config.tie_word_embeddings
    written, original = (AutoTokenizer.from_pretrained(path) for path in (whole_run / "final", pair.student))
    assert written.get_vocab() == original.get_vocab()


def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    whole_run: Path, pair: Pair, tmp_path: Path
) -> None:
    config = pair.config(tmp_path)
    with started_job(config, ranks=2) as ranks:
        wait_event(ranks[0], "checkpoint written")
        for rank in ranks:
            rank.kill()
        assert [outcome.exit_code for outcome in finish(ranks)] == [-signal.SIGKILL] * 2
    assert len(losses(tmp_path / "run")) < STEPS
    for outcome in run_job(config, ranks=2):
        assert outcome.exit_code == 0, outcome.errors
    assert losses(tmp_path / "run") == losses(whole_run)
    assert [scores["kl_nats_per_token"] for scores in evaluations(tmp_path / "run").values()] == [
        scores["kl_nats_per_token"] for scores in evaluations(whole_run).values()
    ]


def test_sigterm_leaves_a_checkpoint_and_the_same_command_continues(pair: Pair, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, student=pair.student, teacher=pair.teacher, steps=5000, checkpoint={"every": 3, "keep": 1}
    )
    with started_job(config, ranks=2) as ranks:
        wait_event(ranks[0], "checkpoint written")
        ranks[1].send_signal(signal.SIGTERM)  # one rank is told; all of them stop
        first, second = finish(ranks)
    assert (first.exit_code, second.exit_code) == (0, 0), first.errors
    assert '"event": "stopped"' in first.errors
    done = len(losses(tmp_path / "run"))
    assert 3 <= done < 5000
    assert checkpoint_steps(tmp_path / "run") == [done]
    assert not (tmp_path / "run" / "final").exists()
    (outcome,) = run_job(config, f"steps={done + 2}", ranks=1)
    assert outcome.exit_code == 0, outcome.errors
    assert list(losses(tmp_path / "run")) == list(range(done + 2))
    assert (tmp_path / "run" / "final").is_dir()


@pytest.mark.slow
def test_a_job_comes_nearer_to_what_the_teacher_says_in_its_context(
    whole_run: Path, pair: Pair, tmp_path: Path
) -> None:
    config = pair.config(tmp_path)
    told = "{kind: system_prompt, text: It is asked when the quick brown fox returns a value.}"
    (outcome,) = run_job(config, f"data.teacher_context={told}")
    assert outcome.exit_code == 0, outcome.errors
    scores, plain = evaluations(tmp_path / "run"), evaluations(whole_run)
    assert scores[0]["num_loss_tokens"] == plain[0]["num_loss_tokens"]
    assert abs(scores[0]["kl_nats_per_token"] - plain[0]["kl_nats_per_token"]) > 1e-4
    assert scores[STEPS]["kl_nats_per_token"] < 0.7 * scores[0]["kl_nats_per_token"]
    (refused,) = run_job(config, "data.teacher_context={kind: system_prompt, text: Another.}", "steps=30")
    assert refused.exit_code == 2
    assert "data.teacher_context (digest)" in refused.errors


def test_sft_is_judged_by_the_teacher_all_the_same(pair: Pair, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, student=pair.student, teacher=pair.teacher, steps=3, objective={"name": "sft"}, ranks=1
    )
    (outcome,) = run_job(config)
    assert outcome.exit_code == 0, outcome.errors
    scores = evaluations(tmp_path / "run")
    assert scores[0]["kl_nats_per_token"] > 0
    assert scores[0]["top1_agreement"] is not None


def test_sft_needs_no_teacher(pair: Pair, tmp_path: Path) -> None:
    config = write_config(tmp_path, student=pair.student, teacher=None, steps=3, objective={"name": "sft"})
    (outcome,) = run_job(config)
    assert outcome.exit_code == 0, outcome.errors
    assert evaluations(tmp_path / "run")[3]["kl_nats_per_token"] is None


def test_a_model_distilled_from_itself_starts_at_zero(pair: Pair, tmp_path: Path) -> None:
    config = write_config(tmp_path, student=pair.teacher_model, teacher=pair.teacher, steps=1)
    (outcome,) = run_job(config)
    assert outcome.exit_code == 0, outcome.errors
    before = evaluations(tmp_path / "run")[0]
    assert abs(before["kl_nats_per_token"]) < 1e-6
    assert before["top1_agreement"] == 1
    assert abs(losses(tmp_path / "run")[0]) < 1e-6


@pytest.mark.parametrize(("ce_weight", "is_told"), [({"start": 1.0, "end": 0.0, "steps": 2}, True), (0.0, False)])
def test_cross_entropy_is_told_of_to_the_end_where_it_was_once_learnt_from(
    pair: Pair, tmp_path: Path, ce_weight: object, is_told: bool
) -> None:
    objective = {"name": "distill", "temperature": 2.0, "ce_weight": ce_weight}
    config = write_config(tmp_path, student=pair.student, teacher=pair.teacher, steps=4, objective=objective)
    (outcome,) = run_job(config)
    assert outcome.exit_code == 0, outcome.errors
    told = [step["cross_entropy_nats_per_token"] is not None for step in records(tmp_path / "run", "step")]
    assert told == 4 * [is_told]
