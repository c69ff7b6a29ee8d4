"""The transformers engine samples from the model's own distribution, and says its probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh.models.decoding.decoder import Decoder
from kdmesh.models.fingerprint import named_weights
from kdmesh.types import FinishReason, Int32Array, Sample, Sampling
from kdmesh_rollout import config
from kdmesh_rollout.engine import Order
from kdmesh_rollout.transformers_engine import TransformersEngine
from tests.support.tiny_models import FAMILIES, HYBRIDS, VOCABULARY_SIZE, TinyModels

PLAIN = Sampling(max_new_tokens=20)

# A linear attention computes a prompt by another formula than one token, and then divides what may be small.
ATOL = dict.fromkeys(FAMILIES, 1e-5) | dict.fromkeys(HYBRIDS, 1e-4)


def engine(path: Path, **settings: Any) -> TransformersEngine:
    made = TransformersEngine(config.TransformersEngine(model=path, device="cpu", **settings))
    made.load()
    return made


def prompt(num_tokens: int, seed: int = 0) -> Int32Array:
    return np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, num_tokens).astype(np.int32)


def orders(lengths: Sequence[int] = (12, 5, 30, 1, 17), sampling: Sampling = PLAIN) -> list[Order]:
    """Prompts of these lengths; later ones answer for longer."""
    return [
        Order(
            key=key,
            prompt_ids=prompt(length, seed=key),
            sampling=replace(sampling, max_new_tokens=sampling.max_new_tokens + 3 * key),
            seed=key,
        )
        for key, length in enumerate(lengths)
    ]


def run(runner: TransformersEngine, wanted: Sequence[Order], *, every: int = 0) -> dict[int, Sample]:
    """The samples by key; a new order joins `every` so many steps, 0 being all at once."""
    finished: dict[int, Sample] = {}
    waiting = list(wanted)
    step = 0
    while waiting or runner.num_running:
        while waiting and (not every or step % every == 0):
            runner.add(waiting.pop(0))
            if every:
                break
        finished |= {one.key: one.sample for one in runner.step()}
        step += 1
    return finished


def forward_logprobs(path: Path, order: Order, sample: Sample, *, vocabulary: int = VOCABULARY_SIZE) -> torch.Tensor:
    """Of the sample's tokens, by transformers' own forward over the whole sequence."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager").eval()
    ids_T = torch.from_numpy(np.concatenate([order.prompt_ids, sample.token_ids])).long()
    with torch.no_grad():
        logits_TV = model(ids_T[None]).logits[0, :, :vocabulary].float()
    first = len(order.prompt_ids)
    return logits_TV.log_softmax(-1)[first - 1 : -1].gather(1, ids_T[first:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_forward_pass(family: str, tiny_models: TinyModels) -> None:
    path = tiny_models.path(family)
    wanted = orders()
    samples = run(engine(path), wanted, every=4)
    assert samples.keys() == {order.key for order in wanted}
    for order in wanted:
        sample = samples[order.key]
        assert sample.num_tokens == order.sampling.max_new_tokens
        expected = forward_logprobs(path, order, sample)
        torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=ATOL[family])


def test_logprobs_of_a_bfloat16_model_are_close(tiny_models: TinyModels) -> None:
    path = tiny_models.path(dtype=torch.bfloat16)
    wanted = orders()
    for key, sample in run(engine(path), wanted).items():
        expected = forward_logprobs(path, wanted[key], sample)
        torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=0.1)


def test_logprobs_are_at_temperature_one_whatever_the_tokens_are_drawn_with(tiny_models: TinyModels) -> None:
    path = tiny_models.path()
    odd = Sampling(max_new_tokens=20, temperature=0.6, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=1.7)
    wanted = orders(sampling=odd)
    for key, sample in run(engine(path), wanted).items():
        expected = forward_logprobs(path, wanted[key], sample)
        torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=1e-5)


def test_temperature_zero_is_the_likeliest_token_each_time(tiny_models: TinyModels) -> None:
    path = tiny_models.path()
    (order,) = orders((12,), Sampling(max_new_tokens=15, temperature=0))
    sample = run(engine(path), [order])[0]
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    ids = torch.from_numpy(order.prompt_ids).long()
    for token in sample.token_ids:
        with torch.no_grad():
            assert int(model(ids[None]).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([token])])


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "deepseek_v3", "gpt_oss", *HYBRIDS])
def test_a_deterministic_seed_gives_the_same_tokens_whatever_else_is_served(
    family: str, tiny_models: TinyModels
) -> None:
    path = tiny_models.path(family)
    wanted = orders()
    together = run(engine(path, deterministic=True), wanted)
    for order in wanted:
        alone = run(engine(path, deterministic=True), [order])[order.key]
        np.testing.assert_array_equal(alone.token_ids, together[order.key].token_ids)
        np.testing.assert_array_equal(alone.logprobs, together[order.key].logprobs)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text", "falcon_h1", "lfm2"])
def test_samples_of_one_prompt_share_its_computation(family: str, tiny_models: TinyModels) -> None:
    path = tiny_models.path(family)
    ids = prompt(40)
    wanted = [Order(key=key, prompt_ids=ids, sampling=PLAIN, seed=key) for key in range(6)]
    runner = engine(path)
    samples = run(runner, wanted)
    assert runner.num_prefilled_tokens == 40
    assert len({tuple(sample.token_ids.tolist()) for sample in samples.values()}) == 6
    for key, sample in samples.items():
        expected = forward_logprobs(path, wanted[key], sample)
        torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=ATOL[family])


def test_long_prompts_join_over_several_steps(tiny_models: TinyModels) -> None:
    path = tiny_models.path()
    runner = engine(path, max_prefill_tokens=32)
    wanted = orders((30, 20, 40, 5), Sampling(max_new_tokens=3))
    for order in wanted:
        runner.add(order)
    prefilled = []
    samples: dict[int, Sample] = {}
    while runner.num_running:
        samples |= {one.key: one.sample for one in runner.step()}
        prefilled.append(runner.num_prefilled_tokens)
    assert prefilled[:4] == [30, 50, 90, 95]
    for key, sample in samples.items():
        expected = forward_logprobs(path, wanted[key], sample)
        torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text", "falcon_h1", "lfm2"])
def test_an_aborted_sample_leaves_the_others_as_they_were(family: str, tiny_models: TinyModels) -> None:
    path = tiny_models.path(family)
    wanted = orders()
    runner = engine(path)
    for order in wanted:
        runner.add(order)
    finished = {one.key: one.sample for _ in range(3) for one in runner.step()}
    runner.abort(1)
    runner.abort(3)
    runner.abort(99)
    assert runner.num_running == 3
    while runner.num_running:
        finished |= {one.key: one.sample for one in runner.step()}
    assert finished.keys() == {0, 2, 4}
    for key, sample in finished.items():
        expected = forward_logprobs(path, wanted[key], sample)
        torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=ATOL[family])


def test_padding_rows_of_the_head_are_never_drawn_and_have_no_probability(tiny_models: TinyModels) -> None:
    path = tiny_models.path(vocab_size=2 * VOCABULARY_SIZE)
    runner = engine(path)
    wanted = orders(sampling=Sampling(max_new_tokens=60, temperature=5.0))
    for key, sample in run(runner, wanted).items():
        assert sample.token_ids.max() < VOCABULARY_SIZE
        expected = forward_logprobs(path, wanted[key], sample)  # over real tokens only
        torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=1e-5)


def test_samples_end_before_the_angles_of_their_positions_change(tiny_models: TinyModels) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 3.0, 8.0, 20.0]}
    path = tiny_models.path("llama", rope_parameters=rope)
    wanted = Order(key=0, prompt_ids=prompt(6), sampling=Sampling(max_new_tokens=40), seed=1)
    sample = run(engine(path), [wanted])[0]
    assert sample.num_tokens == 10
    expected = forward_logprobs(path, wanted, sample)
    torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=1e-5)


def test_stop_tokens_stop_strings_and_the_models_limit_end_a_response(tiny_models: TinyModels) -> None:
    path = tiny_models.path()
    runner = engine(path, max_sequence_tokens=40)
    ids = prompt(12)
    whole = run(runner, [Order(key=0, prompt_ids=ids, sampling=Sampling(max_new_tokens=100), seed=1)])[0]
    assert (whole.num_tokens, whole.finish_reason) == (28, FinishReason.LENGTH)
    drawn = whole.token_ids.tolist()

    stop = Sampling(max_new_tokens=100, stop_token_ids=(drawn[10],))
    stopped = run(runner, [Order(key=1, prompt_ids=ids, sampling=stop, seed=1)])[1]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids.tolist() == drawn[: drawn.index(drawn[10]) + 1]

    assert runner._tokenizer is not None
    texts = [runner._decode(drawn[: end + 1]) for end in range(len(drawn))]
    wanted = texts[9][-5:]
    end = next(end for end, text in enumerate(texts) if wanted in text)
    text = Sampling(max_new_tokens=100, stop_strings=(wanted,))
    cut = run(runner, [Order(key=2, prompt_ids=ids, sampling=text, seed=1)])[2]
    assert (cut.finish_reason, cut.token_ids.tolist()) == (FinishReason.STOP, drawn[: end + 1])


def other_weights(runner: TransformersEngine, path: Path, version: int) -> None:
    """Replace the engine's weights by those in `path`, as an update does."""
    new = named_weights(load_causal_lm(path, "auto", torch.device("cpu")))
    runner.begin()
    for number, spec in enumerate(runner.tensor_specs()):
        data = new[spec.name].detach().contiguous().view(torch.uint8).reshape(-1).numpy().data
        half = len(data) // 2
        runner.write(number, 0, data[:half])
        runner.write(number, half, data[half:])
    runner.commit(version)


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen3", torch.float32), ("gemma2", torch.bfloat16), ("qwen3_5_text", torch.bfloat16)]
)
def test_new_weights_are_those_of_the_model_they_came_from(
    family: str, dtype: torch.dtype, tiny_models: TinyModels
) -> None:
    old, new = tiny_models.path(family, dtype=dtype), tiny_models.path(family, seed=1, dtype=dtype)
    runner = engine(old)
    before = run(runner, orders())
    other_weights(runner, new, version=3)
    after = run(runner, orders())
    fresh = run(engine(new), orders())
    for key, sample in after.items():
        np.testing.assert_array_equal(sample.token_ids, fresh[key].token_ids)
        assert (sample.min_weight_version, sample.max_weight_version) == (3, 3)
        assert sample.token_ids.tolist() != before[key].token_ids.tolist()


def test_discarded_weights_change_nothing(tiny_models: TinyModels) -> None:
    runner = engine(tiny_models.path())
    before = run(runner, orders())
    runner.begin()
    runner.write(0, 0, memoryview(b"\x7f" * 64))
    runner.discard()
    for key, sample in run(runner, orders()).items():
        np.testing.assert_array_equal(sample.token_ids, before[key].token_ids)
        assert sample.max_weight_version == 0


@pytest.mark.parametrize(
    ("family", "deterministic"), [("qwen3", False), ("qwen3", True), ("qwen3_5_text", False), ("qwen3_5_text", True)]
)
def test_a_sample_that_goes_on_with_new_weights_is_computed_anew(
    family: str, deterministic: bool, tiny_models: TinyModels
) -> None:
    old, new = tiny_models.path(family), tiny_models.path(family, seed=1)
    runner = engine(old, deterministic=deterministic)
    wanted = orders()
    for order in wanted:
        runner.add(order)
    for _ in range(7):
        assert runner.step() == []
    other_weights(runner, new, version=2)
    assert runner.num_running == len(wanted)
    samples = run(runner, [])
    for order in wanted:
        sample = samples[order.key]
        assert (sample.min_weight_version, sample.max_weight_version) == (0, 2)
        expected = torch.cat([forward_logprobs(old, order, sample)[:7], forward_logprobs(new, order, sample)[7:]])
        torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=ATOL[family])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_memory_for_keys_grows_with_what_is_decoded(family: str, tiny_models: TinyModels) -> None:
    path = tiny_models.path(family)
    wanted = orders((3, 100, 2), Sampling(max_new_tokens=130))
    for key, sample in run(engine(path), wanted, every=50).items():
        expected = forward_logprobs(path, wanted[key], sample)
        torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=ATOL[family])


def test_a_model_that_keeps_a_state_of_its_own_is_refused(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Decoder.advance

    def forgetful(self: Decoder, token_ids: Sequence[int]) -> torch.Tensor:
        return original(self, [0] * len(token_ids))

    monkeypatch.setattr(Decoder, "advance", forgetful)
    with pytest.raises(ConfigError, match="cannot be sampled from: decoded token by token, its hidden states are"):
        engine(tiny_models.path())
