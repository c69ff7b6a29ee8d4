"""Samples count as much as a judge says, on any number of ranks, and steps of which none counts change nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from kdmesh.tokens import digest
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.stop import StepLost
from tests.support.judged_runs import gradient, judge, judged, textbook, weight_of
from tests.support.tiny_models import TinyModels
from tests.support.trainer_devices import shared_losses
from tests.support.trainer_ranks import run_ranks

SUPPORT = "tests.support.judged_runs"


@pytest.fixture(scope="module")
def models(tiny_models: TinyModels) -> dict[str, Any]:
    return tiny_models.student_and_teacher()


def test_the_gradient_is_that_of_the_weighted_mean_on_one_rank_and_on_two(mesh: Mesh, models: dict[str, Any]) -> None:
    loss, expected, rollouts = textbook(mesh, **models)
    weights = {weight_of(rollout.sequence.labels.tolist()) for rollout in rollouts}
    assert 0 in weights and len(weights) > 2
    for found in (gradient(mesh, **models), *run_ranks(f"{SUPPORT}:gradient", ranks=2, **models)):
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        error = (torch.tensor(found["gradient"]) - expected.flatten()).norm() / expected.norm()
        assert error < 1e-5


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_what_is_left_out_is_neither_trained_on_nor_asked_for_but_counted(
    mesh: Mesh, models: dict[str, Any], max_staleness: int
) -> None:
    _, _, rollouts = textbook(mesh, **models)
    weights = [weight_of(rollout.sequence.labels.tolist()) for rollout in rollouts]
    steps = judged(mesh, names=["by_tokens"] * 4, max_staleness=max_staleness, **models)
    first = steps[0]
    counting = [r for r, weight in zip(rollouts, weights, strict=True) if weight > 0]
    assert first["trained"] == sorted(digest([rollout.sequence]).hex() for rollout in counting)
    assert sorted(first["weights"]) == sorted(weight for weight in weights if weight)
    figures = first["figures"]
    assert figures["sample_weight_mean"] == pytest.approx(sum(weights) / len(weights))
    assert figures["left_out_fraction"] == weights.count(0) / len(weights)
    assert figures["judge_errors"] == 0
    assert "right_fraction" not in figures
    assert figures["response_tokens"] == sum(rollout.sequence.num_rows for rollout in rollouts)
    assert figures["num_loss_tokens"] == sum(rollout.sequence.num_rows for rollout in counting)
    asked = sorted(one for step in steps for one in step["asked"])
    assert asked == sorted(one for step in steps for one in step["trained"])


def test_a_step_without_weight_is_skipped_by_all_ranks_and_training_goes_on(models: dict[str, Any]) -> None:
    names = ["none", "by_tokens", "none", "none", "by_tokens"]
    ranks = run_ranks(f"{SUPPORT}:judged", ranks=2, names=names, **models)
    for one in ranks:
        weights = [step["weight"] for step in one]
        assert [before == after for before, after in pairwise(weights)] == [0, 1, 1, 0]
        for name, step in zip(names, one, strict=True):
            figures = step["figures"]
            assert (figures["loss_nats_per_token"] is None) == (name == "none")
            assert (figures["gradient_norm"] is None) == (name == "none")
            assert (figures["left_out_fraction"] == 1) == (name == "none")
            assert figures["response_tokens"] > 0
            assert figures["learning_rate"] > 0
            assert not step["trained"] or name != "none"
    assert ranks[0][-1]["figures"]["loss_nats_per_token"] == ranks[1][-1]["figures"]["loss_nats_per_token"]


def test_on_a_shared_device_a_step_without_weight_leaves_everybody_where_they_were(
    mesh: Mesh, models: dict[str, Any]
) -> None:
    run = shared_losses(mesh, steps=3, judge=judge("none"), **models)
    assert run["losses"] == [None] * 3
    assert run["asleep"] == [[], []]


def test_answers_of_the_data_keep_their_weights_beside_samples_that_are_left_out(
    mesh: Mesh, models: dict[str, Any]
) -> None:
    [step] = judged(mesh, names=["none"], answers=2, **models)
    assert step["weights"] == [1, 1]
    assert step["figures"]["loss_nats_per_token"] > 0
    assert step["figures"]["left_out_fraction"] == 1


def test_samples_on_which_the_judge_fails_are_left_out_and_a_step_of_them_ends_the_run(
    mesh: Mesh, models: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    [step] = judged(mesh, names=["failing"], **models)
    errors = step["figures"]["judge_errors"]
    assert errors > 0
    assert step["figures"]["left_out_fraction"] == errors / 6
    [told] = [record for record in caplog.records if "the judge failed" in record.message]
    assert (told.step, told.samples, told.why) == (0, errors, "ValueError: no")  # type: ignore[attr-defined]
    with pytest.raises(StepLost, match=r"failed on all 6 samples of step 0, .*: ValueError: no row has that"):
        judged(mesh, names=["broken"], **models)
