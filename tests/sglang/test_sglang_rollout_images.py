"""A rollout server whose real SGLang reads images draws what the embedded engine draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmesh.errors import InvalidRequest
from kdmesh.models.body import load_causal_lm
from kdmesh.models.fingerprint import architecture_fingerprint, named_weights
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.types import DType, Sample, Sampling, TokenSequence
from kdmesh.weights.manifest import TensorSpec, UpdatePolicy
from kdmesh_rollout.config import TransformersEngine as EmbeddedConfig
from kdmesh_rollout.engine import Order
from kdmesh_rollout.transformers_engine import TransformersEngine
from tests.support.sglang_rollouts import sglang_rollout
from tests.support.teacher_process import TeacherProcess
from tests.support.tiny_vision import TinyVisionModels, png, reader_of, vision_sequence

pytestmark = pytest.mark.sglang

PLAIN = Sampling(max_new_tokens=12)
PENALISED = Sampling(max_new_tokens=12, temperature=0.7, top_k=40, repetition_penalty=1.4)


@pytest.fixture(scope="module")
def model(tiny_vision: TinyVisionModels) -> Path:
    return tiny_vision.path(max_pixels=2**18, patch=14)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with sglang_rollout(tmp_path_factory.mktemp("s"), model) as running:
        yield running


@pytest.fixture
def pool(server: TeacherProcess) -> Iterator[RolloutPool]:
    with RolloutPool([server.grpc], job="test", deadline_s=150) as opened:
        yield opened


def embedded(model: Path, prompt: TokenSequence, sampling: Sampling, *, seeds: range) -> list[Sample]:
    engine = TransformersEngine(EmbeddedConfig(model=model, device="cpu", deterministic=True))
    engine.load()
    for seed in seeds:
        engine.add(Order(key=seed, prompt_ids=prompt.token_ids, sampling=sampling, seed=seed, images=prompt.images))
    samples = {}
    while engine.num_running:
        samples |= {one.key: one.sample for one in engine.step()}
    return [samples[seed] for seed in seeds]


def check(pool: RolloutPool, model: Path, prompt: TokenSequence, sampling: Sampling = PLAIN) -> None:
    samples = pool.submit(prompt.token_ids, sampling, num_samples=3, seed=5, images=prompt.images).wait()
    for sample, expected in zip(samples, embedded(model, prompt, sampling, seeds=range(5, 8)), strict=True):
        assert sample.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_allclose(sample.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize("sampling", [PLAIN, PENALISED], ids=["plain", "penalised"])
def test_a_seed_draws_what_the_embedded_engine_draws_after_images(
    pool: RolloutPool, model: Path, sampling: Sampling
) -> None:
    reader = reader_of(model)
    check(pool, model, vision_sequence(reader, 5, png(60, 90, seed=1), 9, png(200, 80, seed=2), 7, seed=1), sampling)
    check(pool, model, vision_sequence(reader, 11, seed=2), sampling)


def test_the_same_text_after_another_image_is_not_taken_from_the_cache(pool: RolloutPool, model: Path) -> None:
    reader = reader_of(model)
    for seed in (5, 6, 5):
        check(pool, model, vision_sequence(reader, 40, png(112, 112, seed=seed), 9, seed=7))


def test_an_image_longer_than_a_chunk_is_read(pool: RolloutPool, model: Path) -> None:
    prompt = vision_sequence(reader_of(model), 9, png(420, 308, seed=4), 9, seed=4)
    assert prompt.images[0].num_tokens > 128
    check(pool, model, prompt)


def test_an_image_token_without_an_image_is_refused(pool: RolloutPool, model: Path) -> None:
    prompt = vision_sequence(reader_of(model), 9, seed=8)
    prompt.token_ids[2] = reader_of(model).token_id
    with pytest.raises(InvalidRequest, match="has 1 image tokens"):
        pool.submit(prompt.token_ids, PLAIN, num_samples=1, seed=1).wait()


def test_new_weights_sample_and_see_as_the_embedded_engine_with_them(
    server: TeacherProcess, pool: RolloutPool, model: Path, tiny_vision: TinyVisionModels
) -> None:
    other = tiny_vision.path(seed=3, max_pixels=2**18, patch=14)
    weights = named_weights(load_causal_lm(other, torch.float32, torch.device("cpu")))
    sent = [
        (TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DType.FLOAT32), lambda tensor=tensor: tensor)
        for name, tensor in weights.items()
    ]
    fingerprint = pool.describe().architecture_fingerprint
    assert fingerprint == architecture_fingerprint(load_causal_lm(model, torch.float32, torch.device("cpu")))
    with WeightSender([server.grpc], deadline_s=100) as sender:
        sender.publish(1, fingerprint, sent, UpdatePolicy.FINISH)
    pool.note_weights(1, behind=())
    check(pool, other, vision_sequence(reader_of(model), 5, png(60, 90, seed=1), 9, seed=1))
