"""A rollout server that reads images: they travel once, and samples are tied to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdmesh.errors import InvalidRequest
from kdmesh.rpc.rollouts.client import Ask, RolloutClient
from kdmesh.rpc.rollouts.codec import sample_digest
from kdmesh.serving.addresses import Addresses
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.types import Sampling, TokenSequence
from kdmesh_rollout.build import build_engine
from kdmesh_rollout.config import RolloutConfig
from kdmesh_rollout.lifecycle import serve
from tests.support.rollout_samples import generate
from tests.support.tiny_models import TinyModels
from tests.support.tiny_vision import TinyVisionModels, png, reader_of, vision_sequence


@contextlib.asynccontextmanager
async def connected(model: Path) -> AsyncIterator[RolloutClient]:
    config = RolloutConfig.model_validate(
        {
            "engine": {"kind": "transformers", "model": str(model), "device": "cpu", "deterministic": True},
            "server": {"port": 0, "rest_port": 0},
        }
    )
    thread, stop, loop = EngineThread(), asyncio.Event(), asyncio.get_running_loop()
    ready: asyncio.Future[Addresses] = loop.create_future()
    ended = asyncio.create_task(
        serve(config, build_engine(config.engine), thread, stop=stop, on_ready=ready.set_result)
    )
    try:
        await asyncio.wait((ended, ready), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        client = await RolloutClient.connect(ready.result().grpc, job="test")
        yield client
        await client.close()
    finally:
        stop.set()
        await asyncio.wait((ended,))
        await asyncio.to_thread(thread.close, 5)


def ask(prompt: TokenSequence) -> Ask:
    return Ask(
        prompt_ids=prompt.token_ids,
        sampling=Sampling(max_new_tokens=6),
        num_samples=2,
        seed=3,
        min_weight_version=0,
        images=prompt.images,
    )


async def test_another_image_gives_other_samples_and_the_same_one_the_same(tiny_vision: TinyVisionModels) -> None:
    path = tiny_vision.path()
    reader = reader_of(path)
    one, other = (vision_sequence(reader, 5, png(40, 40, seed=seed), 4, seed=1) for seed in (1, 2))
    async with connected(path) as client:
        assert client.model.vision is not None
        first, second, again = [await generate(client, ask(prompt), deadline_s=60) for prompt in (one, other, one)]
    tokens = [[sample.token_ids.tolist() for sample in samples] for samples in (first, second, again)]
    assert tokens[0] == tokens[2]
    assert not np.array_equal(first[0].logprobs, second[0].logprobs)
    digests = [sample_digest(one.token_ids, first[0], prompt.images) for prompt in (one, other)]
    assert digests[0] != digests[1]


async def test_prompts_whose_images_cannot_be_read_are_refused(
    tiny_vision: TinyVisionModels, tiny_models: TinyModels
) -> None:
    path = tiny_vision.path()
    prompt = vision_sequence(reader_of(path), 5, png(40, 40, seed=1), 4, seed=1)
    async with connected(path) as client:
        with pytest.raises(InvalidRequest, match=r"has 25 image tokens .* 0 of them belong"):
            await generate(client, replace(ask(prompt), images=()), deadline_s=60)
    async with connected(tiny_models.path()) as client:
        with pytest.raises(InvalidRequest, match="the prompt has 1 images; this model reads none"):
            await generate(client, ask(prompt), deadline_s=60)
