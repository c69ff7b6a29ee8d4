"""The projectors of dual-space distillation are a part of what ranks train together, and of what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.killed_runs import check_exact_continuation
from tests.support.tiny_models import TinyModels
from tests.support.trainer_ranks import run_ranks

RUNS = "tests.support.trainer_runs"
STEPS = 6


@pytest.fixture
def arguments(tiny_models: TinyModels, tmp_path: Path) -> dict[str, Any]:
    return {
        "student": str(tiny_models.path("qwen3", seed=1, tie_word_embeddings=True)),
        "teacher": str(tiny_models.path("qwen3", seed=2, hidden_size=48)),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": STEPS,
        "is_dual_space": True,
    }


@pytest.mark.slow
def test_two_ranks_train_the_projectors_that_one_does_also_where_one_has_nothing_to_do(
    arguments: dict[str, Any],
) -> None:
    arguments |= {"until": STEPS, "num_sequences": [3, 1]}
    first, second = run_ranks(f"{RUNS}:train", ranks=2, **arguments)
    (alone,) = run_ranks(f"{RUNS}:train", ranks=1, **arguments)
    (untrained,) = run_ranks(f"{RUNS}:train", ranks=1, **arguments | {"until": 0})
    assert first["blanks"] + second["blanks"] > 0
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name, values in alone["parameters"].items():
        assert first["parameters"][name] == second["parameters"][name] == pytest.approx(values, rel=1e-3, abs=1e-5)
        assert values != pytest.approx(untrained["parameters"][name], abs=1e-3)


@pytest.mark.slow
def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    check_exact_continuation(arguments | {"until": STEPS}, tmp_path / "other")
