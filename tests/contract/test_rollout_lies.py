"""A sample that is not one of the request is never used."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kdmesh import errors
from kdmesh.rpc.rollouts import codec as rollout_codec
from kdmesh.types import Int32Array, PlacedImage, Sample
from kdmesh.v1 import rollout_pb2 as pb
from tests.support.rollout_samples import ask, expected_tokens, generate, prompt
from tests.support.rollout_server import running_rollout


def another_token(sample: pb.Sample) -> None:
    sample.token_ids[0] = (sample.token_ids[0] + 1) % 60


def no_digest(sample: pb.Sample) -> None:
    sample.ClearField("digest")


def fewer_logprobs(sample: pb.Sample) -> None:
    del sample.logprobs[-1]


def a_likelihood_above_one(sample: pb.Sample) -> None:
    sample.logprobs[0] = 0.5


def no_reason(sample: pb.Sample) -> None:
    sample.finish_reason = pb.FINISH_REASON_UNSPECIFIED


def versions_that_fall(sample: pb.Sample) -> None:
    sample.min_weight_version = 4


def nothing_drawn(sample: pb.Sample) -> None:
    del sample.token_ids[:], sample.logprobs[:]


def another_index(sample: pb.Sample) -> None:
    sample.sample_index = 1


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (another_token, "the digest of a sample is not that of its prompt and its tokens"),
        (no_digest, "the digest of a sample is not that of its prompt and its tokens"),
        (fewer_logprobs, r"a sample of 6 tokens has log-probabilities of shape \(5,\)"),
        (a_likelihood_above_one, "a log-probability is 0.5"),
        (no_reason, "unknown finish reason 0"),
        (versions_that_fall, "weight versions 4 to 0"),
        (nothing_drawn, "at least 1 token"),
        (another_index, "sample 1, which is not missing"),
    ],
)
async def test_lies_are_found_out_and_the_stream_goes_on(
    monkeypatch: pytest.MonkeyPatch, lie: Callable[[pb.Sample], None], sentence: str
) -> None:
    honest = rollout_codec.sample_to_wire

    def lying(index: int, sample: Sample, prompt_ids: Int32Array, images: tuple[PlacedImage, ...]) -> pb.Sample:
        message = honest(index, sample, prompt_ids, images)
        lie(message)
        return message

    async with running_rollout() as server, server.client() as client:
        monkeypatch.setattr(rollout_codec, "sample_to_wire", lying)
        with pytest.raises(errors.EngineFailure, match=f"sent .*{sentence}"):
            await generate(client, ask(prompt()))
        monkeypatch.undo()
        assert (await generate(client, ask(prompt())))[0].token_ids.tolist() == expected_tokens(prompt(), 7, 6)
        await server.until(running=0)


async def test_a_sample_that_comes_twice_is_used_once_and_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rollout_codec.sample_to_wire
    monkeypatch.setattr(rollout_codec, "sample_to_wire", lambda index, sample, *prompt: honest(0, sample, *prompt))
    arrived: list[int] = []
    async with running_rollout() as server, server.client() as client:
        with pytest.raises(errors.EngineFailure, match="sample 0, which is not missing"):
            await generate(client, ask(prompt(), samples=3), on_sample=lambda index, sample: arrived.append(index))
    assert arrived == [0]
