"""A real job whose teacher has another tokenizer than the student."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.other_tokenizers import save_sentence_piece
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import (
    evaluations,
    losses,
    records,
    run_job,
    serving_rollouts,
    serving_teacher,
    started_job,
    write_config,
)
from tests.support.trainer_ranks import finish

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address and its tokenizer."""
    directory = tmp_path_factory.mktemp("other")
    size = save_sentence_piece(directory / "tokenizer")
    path = tiny_models.path("qwen3", seed=2, hidden_size=48, vocab_size=size + 7, tokenizer=False)
    save_sentence_piece(path)
    with serving_teacher(directory, path) as address:
        yield address, directory / "tokenizer"


def job(
    directory: Path,
    tiny_models: TinyModels,
    teacher: tuple[str, Path],
    *,
    min_aligned: float = 0.3,
    algorithm: dict[str, object] | None = None,
) -> Path:
    address, tokenizer = teacher
    config = write_config(
        directory,
        student=tiny_models.path("qwen3", seed=1, tie_word_embeddings=True),
        teacher=address,
        steps=24,
        optimizer={"learning_rate": 0.01, "warmup_steps": 2},
        evaluation={"every": 12},
        checkpoint={"every": 10, "keep": 1},
    )
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    tree["data"]["teacher_tokenizer"] = {"path": str(tokenizer), "min_aligned": min_aligned}
    if algorithm is not None:
        tree["objective"] = {"name": "distill", "algorithm": algorithm}
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


def test_a_student_comes_nearer_to_a_teacher_of_another_tokenizer_on_any_number_of_ranks(
    tiny_models: TinyModels, teacher: tuple[str, Path], tmp_path: Path
) -> None:
    runs = {}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        first, *others = run_job(job(tmp_path / str(ranks), tiny_models, teacher), ranks=ranks)
        assert [outcome.exit_code for outcome in (first, *others)] == [0] * ranks, first.errors
        runs[ranks] = tmp_path / str(ranks) / "run"
    scores = evaluations(runs[1])
    assert scores[24]["kl_nats_per_token"] < 0.7 * scores[0]["kl_nats_per_token"]
    for step, loss in losses(runs[1]).items():
        assert losses(runs[2])[step] == pytest.approx(loss, rel=1e-4)
    [aligned] = [line for line in map(json.loads, first.errors.splitlines()) if line["event"] == "tokenizers aligned"]
    assert 0.3 < aligned["aligned_fraction"] < 1


def test_another_tokenizer_than_the_teachers_own_and_too_little_in_common_are_refused(
    tiny_models: TinyModels, teacher: tuple[str, Path], tmp_path: Path
) -> None:
    config = job(tmp_path, tiny_models, teacher, min_aligned=1.0)
    (outcome,) = run_job(config)
    assert outcome.exit_code != 0
    assert "these tokenizers have too little in common" in outcome.errors
    (tmp_path / "third").mkdir()
    save_sentence_piece(tmp_path / "third", size=300)
    third = f"data.teacher_tokenizer.path={tmp_path / 'third'}"
    (outcome,) = run_job(config, third, "data.teacher_tokenizer.min_aligned=0")
    assert outcome.exit_code != 0
    assert "has another tokenizer" in outcome.errors


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "alm"},
        {"name": "alm", "debias_above": 0.1},
        {"name": "uld"},
        {"name": "gold", "matched_weight": 1.0},
    ],
)
def test_what_compares_runs_of_tokens_learns_the_same_on_any_number_of_ranks(
    algorithm: dict[str, object], tiny_models: TinyModels, teacher: tuple[str, Path], tmp_path: Path
) -> None:
    runs = {}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        config = job(tmp_path / str(ranks), tiny_models, teacher, min_aligned=0.9, algorithm=algorithm)
        first, *others = run_job(config, ranks=ranks)
        assert [outcome.exit_code for outcome in (first, *others)] == [0] * ranks, first.errors
        runs[ranks] = tmp_path / str(ranks) / "run"
    for step, loss in losses(runs[1]).items():
        assert losses(runs[2])[step] == pytest.approx(loss, rel=2e-4)
    assert losses(runs[1])[23] < 0.9 * losses(runs[1])[0]
    scores = evaluations(
        runs[1]
    )  # over shared tokens, whatever was learnt; a likelihood says nothing of what is not there
    assert algorithm["name"] == "alm" or scores[24]["kl_nats_per_token"] < scores[0]["kl_nats_per_token"]


@pytest.mark.parametrize("token_alignment", ["eta", "cma"])
def test_dual_space_learns_the_same_on_any_number_of_ranks(
    token_alignment: str, tiny_models: TinyModels, teacher: tuple[str, Path], tmp_path: Path
) -> None:
    runs = {}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        config = job(
            tmp_path / str(ranks), tiny_models, teacher, algorithm={"name": "dskd", "token_alignment": token_alignment}
        )
        first, *others = run_job(config, "optimizer.learning_rate=0.003", ranks=ranks)
        assert [outcome.exit_code for outcome in (first, *others)] == [0] * ranks, first.errors
        runs[ranks] = tmp_path / str(ranks) / "run"
    for step, loss in losses(runs[1]).items():
        assert losses(runs[2])[step] == pytest.approx(loss, rel=2e-4)
    assert losses(runs[1])[23] < losses(runs[1])[0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "ranks"), [("vanilla_kd", 1), ("alm", 2), ("gold", 1)])
def test_samples_are_trained_on_as_they_were_drawn_and_scored_as_the_teacher_reads_them(
    name: str, ranks: int, tiny_models: TinyModels, teacher: tuple[str, Path], tmp_path: Path
) -> None:
    config = job(tmp_path, tiny_models, teacher, min_aligned=0.2, algorithm={"name": name})
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    with serving_rollouts(tmp_path, Path(tree["student"]["model"])) as address:
        tree["source"] = {
            "kind": "on_policy",
            "rollouts": {"addresses": [address], "deadline_s": 100},
            "sampling": {"max_new_tokens": 12},
            "show_every": 4,
        }
        tree |= {"steps": 4, "evaluation": {}, "checkpoint": {}}
        del tree["data"]["held_out"]
        config.write_text(yaml.safe_dump(tree), encoding="utf-8")
        with started_job(config, ranks=ranks) as processes:
            outcomes = finish(processes, within_s=300)
    assert [outcome.exit_code for outcome in outcomes] == [0] * ranks, [outcome.errors for outcome in outcomes]
    steps = records(tmp_path / "run", "step")
    assert len(steps) == 4
    assert all(0 < step["aligned_fraction"] <= 1 for step in steps)
    # The log-probabilities that were sampled with are those of the rows that are trained on: their ids are the same.
    assert all(abs(step["sampler_kl_k1_nats"]) < 1e-4 for step in steps)
    assert all((step["student_entropy_nats"] is None) == (name != "vanilla_kd") for step in steps)
    shown = json.loads((tmp_path / "run/samples.jsonl").read_text(encoding="utf-8"))
    asked = shown["prompt"].split("user\n")[1].split("<|im_end|>")[0]
    assert shown["teacher_prompt"] == f"<s><|ask|>{asked}<|answer|>"  # each side by its own tokenizer
