"""What a rollout server samples in SGLang is drawn as the embedded engine draws, and ends where it must."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.types import FinishReason, Sample, Sampling
from kdmesh_rollout.config import TransformersEngine as EmbeddedConfig
from kdmesh_rollout.engine import Order
from kdmesh_rollout.transformers_engine import TransformersEngine
from tests.support.rollout_samples import prompt
from tests.support.sglang_rollouts import scheduler, sglang_rollout
from tests.support.sglang_teachers import metric
from tests.support.teacher_process import TeacherProcess
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

pytestmark = pytest.mark.sglang

ODD = Sampling(max_new_tokens=24, temperature=0.7, top_p=0.9, top_k=40, min_p=0.02, repetition_penalty=1.4)


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models.path(vocab_size=VOCABULARY_SIZE + 32)  # the head's last rows are no tokens


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with sglang_rollout(tmp_path_factory.mktemp("s"), model) as running:
        yield running


@pytest.fixture
def pool(server: TeacherProcess) -> Iterator[RolloutPool]:
    with RolloutPool([server.grpc], job="test", deadline_s=150) as opened:
        yield opened


def ids(num_tokens: int, seed: int = 0) -> Any:
    return prompt(num_tokens, seed=seed, vocabulary_size=VOCABULARY_SIZE)


def embedded(model: Path, prompt_ids: Any, sampling: Sampling, *, seeds: range) -> list[Sample]:
    engine = TransformersEngine(EmbeddedConfig(model=model, device="cpu", deterministic=True))
    engine.load()
    for seed in seeds:
        engine.add(Order(key=seed, prompt_ids=prompt_ids, sampling=sampling, seed=seed))
    samples = {}
    while engine.num_running:
        samples |= {one.key: one.sample for one in engine.step()}
    return [samples[seed] for seed in seeds]


@pytest.mark.parametrize(
    ("sampling", "num_tokens"),
    [(Sampling(max_new_tokens=24), 40), (Sampling(max_new_tokens=24), 200), (ODD, 40)],
    ids=["plain", "prompt of two chunks", "odd"],
)
def test_a_seed_draws_the_tokens_that_the_embedded_engine_draws(
    pool: RolloutPool, model: Path, sampling: Sampling, num_tokens: int
) -> None:
    prompt_ids = ids(num_tokens)
    samples = pool.submit(prompt_ids, sampling, num_samples=4, seed=5).wait()
    for sample, expected in zip(samples, embedded(model, prompt_ids, sampling, seeds=range(5, 9)), strict=True):
        assert sample.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_allclose(sample.logprobs, expected.logprobs, atol=1e-4)
        assert sample.finish_reason is FinishReason.LENGTH
        assert (sample.min_weight_version, sample.max_weight_version) == (0, 0)


def test_temperature_zero_is_what_hugging_face_takes(pool: RolloutPool, model: Path) -> None:
    (sample,) = pool.submit(ids(21), Sampling(max_new_tokens=30, temperature=0), num_samples=1, seed=None).wait()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    tokens = torch.from_numpy(ids(21)).long()[None]
    with torch.no_grad():
        for token in sample.token_ids:
            assert int(reference(tokens).logits[0, -1, :VOCABULARY_SIZE].argmax()) == token
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)


def test_samples_without_a_seed_differ(pool: RolloutPool) -> None:
    samples = pool.submit(ids(9), Sampling(max_new_tokens=12), num_samples=3, seed=None).wait()
    assert len({tuple(sample.token_ids.tolist()) for sample in samples}) == 3


def test_a_stop_token_ends_a_response_and_is_its_last(pool: RolloutPool) -> None:
    plain = Sampling(max_new_tokens=60)
    (whole,) = pool.submit(ids(12), plain, num_samples=1, seed=3).wait()
    stop = int(whole.token_ids[25])
    first = whole.token_ids.tolist().index(stop)
    (cut,) = pool.submit(ids(12), replace(plain, stop_token_ids=(stop,)), num_samples=1, seed=3).wait()
    assert cut.token_ids.tolist() == whole.token_ids[: first + 1].tolist()
    assert cut.finish_reason is FinishReason.STOP


def test_nothing_ends_a_response_but_what_its_request_names(pool: RolloutPool) -> None:
    samples = pool.submit(ids(12), Sampling(max_new_tokens=200), num_samples=8, seed=1).wait()
    assert {sample.num_tokens for sample in samples} == {200}
    assert any(2 in sample.token_ids for sample in samples)  # the model's own end of text


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(pool: RolloutPool, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    plain = Sampling(max_new_tokens=60)
    (whole,) = pool.submit(ids(12), plain, num_samples=1, seed=3).wait()
    text = tokenizer.decode(whole.token_ids[20:22])
    first = next(n for n in range(1, 61) if text in tokenizer.decode(whole.token_ids[:n]))
    (cut,) = pool.submit(ids(12), replace(plain, stop_strings=(text,)), num_samples=1, seed=3).wait()
    assert cut.token_ids.tolist() == whole.token_ids[:first].tolist()
    assert cut.finish_reason is FinishReason.STOP


def test_samples_of_one_prompt_prefill_it_once(server: TeacherProcess, pool: RolloutPool) -> None:
    before = metric(server, "kdmesh_rollout_prefilled_tokens_total")
    pool.submit(ids(200, seed=8), Sampling(max_new_tokens=4), num_samples=8, seed=1).wait()
    computed = metric(server, "kdmesh_rollout_prefilled_tokens_total") - before
    assert computed == 200 + 8  # each sample computes the prompt's last token, for its own first


def test_longest_prompt_leaves_room_for_one_token(pool: RolloutPool) -> None:
    most = pool.describe().max_sequence_tokens
    (sample,) = pool.submit(ids(most - 1), Sampling(max_new_tokens=50), num_samples=1, seed=1).wait()
    assert (sample.num_tokens, sample.finish_reason) == (1, FinishReason.LENGTH)


def test_longest_samples_are_drawn_where_pages_of_a_small_cache_limit_them(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_models.path(max_position_embeddings=1024)
    pages = {"max_total_tokens": 512, "page_size": 64}
    with (
        sglang_rollout(tmp_path_factory.mktemp("s"), model, arguments=pages) as server,
        RolloutPool([server.grpc], job="test", deadline_s=60) as pool,
    ):
        most = pool.describe().max_sequence_tokens
        assert most > 512 - 3 * 64
        for length in (most - 1, 65, 20):
            (sample,) = pool.submit(ids(length), Sampling(max_new_tokens=1000), num_samples=1, seed=1).wait()
            assert (sample.num_tokens, sample.finish_reason) == (most - length, FinishReason.LENGTH)


def test_a_short_request_does_not_wait_for_long_ones(pool: RolloutPool) -> None:
    long = pool.submit(ids(5), Sampling(max_new_tokens=240), num_samples=4, seed=1)
    pool.submit(ids(5), Sampling(max_new_tokens=1), num_samples=1, seed=1).wait()
    assert not long.is_done  # and when nobody wants them any more, they are aborted


def test_aborted_samples_leave_at_once(server: TeacherProcess, pool: RolloutPool) -> None:
    process = scheduler(server)
    process.suspend()  # nothing can finish
    try:
        unwanted = pool.submit(ids(40), Sampling(max_new_tokens=200), num_samples=20, seed=1)
        _until_running(server, 16)
        del unwanted
        _until_running(server, 0)
    finally:
        process.resume()
    before = metric(server, "kdmesh_rollout_drawn_tokens_total")
    assert len(pool.submit(ids(40), Sampling(max_new_tokens=3), num_samples=2, seed=1).wait()) == 2
    assert metric(server, "kdmesh_rollout_drawn_tokens_total") - before == 6


def _until_running(server: TeacherProcess, samples: int) -> None:
    while server.get("/v1/queue")["running"] != samples:
        pass


def test_deterministic_samples_are_the_same_bits_whatever_else_is_served(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, plain = tiny_models.path(dtype=torch.bfloat16), Sampling(max_new_tokens=30)
    with (
        sglang_rollout(tmp_path_factory.mktemp("s"), model, deterministic=True) as server,
        RolloutPool([server.grpc], job="test", deadline_s=150) as pool,
    ):
        assert pool.describe().is_deterministic
        quiet = pool.submit(ids(40), plain, num_samples=2, seed=5).wait()
        others = [pool.submit(ids(length), plain, num_samples=4, seed=9) for length in (40, 7)]
        busy = pool.submit(ids(40), plain, num_samples=2, seed=5).wait()
        for one, same in zip(quiet, busy, strict=True):
            assert same.token_ids.tolist() == one.token_ids.tolist()
            np.testing.assert_array_equal(same.logprobs, one.logprobs)
        for other in others:
            other.wait()
