"""New weights reach SGLang's scheduler processes whole or not at all, and every sample says which it was drawn with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from kdmesh.models.fingerprint import architecture_fingerprint
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.types import DType, Sample, Sampling
from kdmesh.weights.doors import DoorChoice
from kdmesh.weights.manifest import UpdatePolicy
from tests.support.reference_logprobs import forward_logprobs, student
from tests.support.rollout_samples import prompt
from tests.support.sglang_rollouts import sglang_rollout
from tests.support.sglang_weights import all_weights, changed, failing_weights, publish, random_changes
from tests.support.teacher_process import TeacherProcess
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels, save_model, save_tokenizer

pytestmark = pytest.mark.sglang

TOLERANCE = 2e-2  # nats; between two implementations in bfloat16, of a model with ordinary weights
FAR = 0.2  # two models of different seeds are further apart than that
PROMPT = prompt(70, vocabulary_size=VOCABULARY_SIZE)  # long enough to be kept in the prefix cache
PLAIN = Sampling(max_new_tokens=40)
LONG = Sampling(max_new_tokens=180)

versions = itertools.count(1)


def path(models: TinyModels, seed: int, **overrides: Any) -> Path:
    return models.path(seed=seed, dtype=torch.bfloat16, initializer_range=0.02, **overrides)


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with sglang_rollout(tmp_path_factory.mktemp("s"), path(tiny_models, 0)) as running:
        yield running


@pytest.fixture
def pool(server: TeacherProcess) -> Iterator[RolloutPool]:
    with RolloutPool([server.grpc], job="test", deadline_s=150) as opened:
        yield opened


def draw(pool: RolloutPool, *, newest: int = 0, samples: int = 4) -> list[Sample]:
    return pool.submit(PROMPT, PLAIN, num_samples=samples, seed=3, min_weight_version=newest).wait()


def distance(model: PreTrainedModel, samples: list[Sample]) -> float:
    """Largest difference of a log-probability to what the trainer's forward gives."""
    return max(
        float((forward_logprobs(model, PROMPT, sample) - torch.from_numpy(sample.logprobs)).abs().max())
        for sample in samples
    )


def test_log_probabilities_in_bfloat16_are_those_of_the_trainers_forward(
    pool: RolloutPool, tiny_models: TinyModels
) -> None:
    assert pool.describe().dtype is DType.BFLOAT16
    assert distance(student(path(tiny_models, 0)), draw(pool, samples=8)) < TOLERANCE


@pytest.mark.parametrize("door", ["shm", "collective", "inline"])
def test_new_weights_through_any_door_are_what_is_sampled_from(
    server: TeacherProcess, pool: RolloutPool, tiny_models: TinyModels, door: DoorChoice
) -> None:
    version = next(versions)
    before, new = draw(pool), student(path(tiny_models, version))
    assert distance(new, before) > FAR
    publish(server.grpc, new, version, door=door)
    after = draw(pool, newest=version)
    assert distance(new, after) < TOLERANCE
    assert {(sample.min_weight_version, sample.max_weight_version) for sample in after} == {(version, version)}


def test_changes_of_low_rank_come_to_sglang_as_whole_matrices(
    server: TeacherProcess, pool: RolloutPool, tiny_models: TinyModels
) -> None:
    base = student(path(tiny_models, 40))
    told = architecture_fingerprint(base)
    with WeightSender([server.grpc], deadline_s=60) as sender:
        sent = all_weights(base)
        for part in ("o_proj", "down_proj"):
            version = next(versions)
            changes = random_changes(base, seed=version, part=part)
            sender.publish(version, told, sent, UpdatePolicy.FINISH, changes)
            samples = draw(pool, newest=version)
            assert distance(changed(base, changes), samples) < TOLERANCE
            assert distance(base, samples) > 2 * TOLERANCE
            sent = failing_weights(base)  # the base does not travel again


def test_interrupted_update_changes_nothing(server: TeacherProcess, pool: RolloutPool, tiny_models: TinyModels) -> None:
    version = next(versions)
    publish(server.grpc, student(path(tiny_models, version)), version)
    before = draw(pool)
    with pytest.raises(ConnectionAbortedError):
        publish(server.grpc, student(path(tiny_models, 50)), next(versions), weights=failing_weights)
    for old, same in zip(before, draw(pool), strict=True):
        assert same.token_ids.tolist() == old.token_ids.tolist()
        np.testing.assert_array_equal(same.logprobs, old.logprobs)
        assert same.max_weight_version == version
    later = next(versions)
    publish(server.grpc, student(path(tiny_models, later)), later)  # and the next is taken
    assert distance(student(path(tiny_models, later)), draw(pool, newest=later)) < TOLERANCE


def under_way(pool: RolloutPool) -> Any:
    """Long samples, some tokens of which have been drawn."""
    pending = pool.submit(PROMPT, LONG, num_samples=8, seed=3)
    pool.submit(PROMPT, Sampling(max_new_tokens=12), num_samples=1, seed=3).wait()
    return pending


def test_samples_under_way_go_on_with_new_weights_and_say_so(
    server: TeacherProcess, pool: RolloutPool, tiny_models: TinyModels
) -> None:
    old_version, version = next(versions), next(versions)
    old, new = (student(path(tiny_models, seed)) for seed in (old_version, version))
    publish(server.grpc, old, old_version)
    pending = under_way(pool)
    publish(server.grpc, new, version, policy=UpdatePolicy.CONTINUE)
    for sample in pending.wait():
        assert (sample.min_weight_version, sample.max_weight_version) == (old_version, version)
        logprobs = torch.from_numpy(sample.logprobs)
        is_old, is_new = (
            (forward_logprobs(model, PROMPT, sample) - logprobs).abs() < TOLERANCE for model in (old, new)
        )
        turns = [turn for turn in range(1, sample.num_tokens) if is_old[:turn].all() and is_new[turn:].all()]
        assert turns, "no place before which all is of the old weights, and behind which all is of the new ones"


def test_samples_under_way_are_drawn_again_when_an_update_aborts_them(
    server: TeacherProcess, pool: RolloutPool, tiny_models: TinyModels
) -> None:
    version = next(versions)
    new = student(path(tiny_models, version))
    pending = under_way(pool)
    publish(server.grpc, new, version, policy=UpdatePolicy.ABORT)
    assert not pending.is_done
    samples = pending.wait()
    assert {(sample.min_weight_version, sample.max_weight_version) for sample in samples} == {(version, version)}
    assert distance(new, samples) < TOLERANCE


def test_processes_that_share_a_model_all_take_new_weights(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first, new = (path(tiny_models, seed, tie_word_embeddings=True) for seed in (1, 2))
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with (
        sglang_rollout(tmp_path_factory.mktemp("s"), first, variables=cores, tensor_parallel=2) as server,
        RolloutPool([server.grpc], job="test", deadline_s=150) as pool,
    ):
        assert distance(student(first), draw(pool)) < TOLERANCE
        publish(server.grpc, student(new), 7)
        samples = draw(pool, newest=7)
        assert distance(student(new), samples) < TOLERANCE
        assert distance(student(first), samples) > FAR


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_mixture_takes_new_weights_for_its_experts(tmp_path_factory: pytest.TempPathFactory, family: str) -> None:
    first, new = (tmp_path_factory.mktemp("m") for _ in range(2))
    for seed, directory in enumerate((first, new)):
        save_model(directory, family, seed=seed, dtype=torch.float32)
        save_tokenizer(directory)
    with (
        sglang_rollout(tmp_path_factory.mktemp("s"), first) as server,
        RolloutPool([server.grpc], job="test", deadline_s=150) as pool,
    ):
        assert distance(student(first), draw(pool)) < 1e-4
        publish(server.grpc, student(new), 1)
        assert distance(student(new), draw(pool, newest=1)) < 1e-4
