"""A real job that compares student and teacher in the space of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import losses, run_job, serving_teacher, write_config

pytestmark = pytest.mark.slow

STEPS = 24


def test_a_student_learns_and_goes_on_with_its_projectors_on_any_number_of_ranks(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    student = tiny_models.path("qwen3", seed=1, tie_word_embeddings=True)
    # Another size, another padding of the vocabulary: only the tokenizer is the same.
    teacher = tiny_models.path("qwen3", seed=2, hidden_size=48, vocab_size=336)
    runs = {}
    with serving_teacher(tmp_path, teacher) as address:
        for name, parts in {"whole": [(STEPS, 1)], "in parts": [(STEPS // 2, 2), (STEPS, 1)]}.items():
            (tmp_path / name).mkdir()
            config = write_config(
                tmp_path / name,
                student=student,
                teacher=address,
                steps=STEPS,
                objective={"name": "distill", "algorithm": {"name": "dskd"}, "ce_weight": 0.2},
                optimizer={"learning_rate": 0.005, "schedule": "constant"},
            )
            for steps, ranks in parts:
                for outcome in run_job(config, f"steps={steps}", ranks=ranks):
                    assert outcome.exit_code == 0, outcome.errors
            runs[name] = tmp_path / name / "run"
    assert list(losses(runs["in parts"])) == list(range(STEPS))
    for step, loss in losses(runs["whole"]).items():
        assert losses(runs["in parts"])[step] == pytest.approx(loss, rel=2e-4)
    assert losses(runs["whole"])[STEPS - 1] < losses(runs["whole"])[0]
    written, original = (AutoModelForCausalLM.from_pretrained(path) for path in (runs["whole"] / "final", student))
    assert written.state_dict().keys() == original.state_dict().keys()  # the projectors are no part of the model


def test_a_run_begins_with_its_own_head_and_not_with_what_an_earlier_one_has_left_in_its_teacher(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    student = tiny_models.path("qwen3", seed=1)
    found = []
    with serving_teacher(tmp_path, student, updatable=True) as address:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            config = write_config(
                tmp_path / name,
                student=student,
                teacher=address,
                steps=2,
                optimizer={"learning_rate": 0.01, "schedule": "constant"},
                objective={
                    "name": "distill",
                    "algorithm": {"name": "dskd", "student_projector": "trained"},
                    "ce_weight": 1.0,
                },
            )
            (outcome,) = run_job(config, "teacher.follows_student={}")
            assert outcome.exit_code == 0, outcome.errors
            found.append(losses(tmp_path / name / "run"))
    assert found[0] == found[1]
