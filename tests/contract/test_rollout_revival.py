"""A rollout server whose engine dies is not ready at once, and samples again from its first weights."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from kdmesh import errors
from kdmesh.weights.manifest import UpdatePolicy
from tests.contract.test_rollout_weights import publish, until_verified, weights
from tests.support.rollout_engines import MortalEngine
from tests.support.rollout_samples import ask, expected_tokens, generate, generating, prompt
from tests.support.rollout_server import RunningRollout, running_rollout


def engine_of(server: RunningRollout) -> MortalEngine:
    assert isinstance(server.engine, MortalEngine)
    return server.engine


async def until_ready(server: RunningRollout) -> None:
    async with asyncio.timeout(10), httpx.AsyncClient() as http:
        while (await http.get(f"http://{server.addresses.rest}/readyz")).status_code != 200:
            pass  # each look is a round trip through the server's loop


async def test_a_new_engine_has_the_first_weights_until_it_gets_others() -> None:
    async with running_rollout(MortalEngine, engine={"max_running": 1}) as server, server.client() as client:
        first, _ = weights(1)
        await publish(server, 1, first, UpdatePolicy.FINISH)
        server.engine.hold()
        running, waiting = generating(client, ask(prompt())), generating(client, ask(prompt(seed=1)))
        await server.until(running=1, waiting=1)
        engine_of(server).kill()
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"http://{server.addresses.rest}/readyz")).status_code == 503
        with pytest.raises(errors.Unavailable, match="the server's engine died"):
            await generate(client, ask(prompt()))
        server.engine.let_go()
        for unanswered in (running, waiting):
            with pytest.raises(errors.Unavailable, match="the engine died; ask again"):
                await unanswered
        await until_ready(server)
        (sample,) = await generate(client, ask(prompt()))
        assert (sample.token_ids.tolist(), sample.min_weight_version) == (expected_tokens(prompt(), 7, 6), 0)
        with pytest.raises(errors.ModelMismatch, match="this server has 0"):
            await generate(client, ask(prompt(), newest=1))
        second, salt = weights(2)
        await publish(server, 2, second, UpdatePolicy.FINISH)
        (sample,) = await generate(client, ask(prompt(), newest=2))
        assert sample.token_ids.tolist() == expected_tokens(prompt(), 7, 6, salt=salt)
        engine_of(server).kill()
        with pytest.raises(errors.EngineFailure, match=r"process 2 died; .* started again 1 times"):
            await server.ended


async def test_an_update_that_the_dead_engine_was_to_take_is_sent_to_the_new_one() -> None:
    async with running_rollout(MortalEngine) as server, server.client() as client:
        new, salt = weights(1)
        server.engine.hold()
        running = generating(client, ask(prompt()))
        await server.until(running=1)
        publishing = asyncio.create_task(publish(server, 1, new, UpdatePolicy.FINISH))
        await until_verified(server)  # it waits for the sample
        engine_of(server).kill()
        server.engine.let_go()
        with pytest.raises(errors.Unavailable):
            await running
        await publishing
        (sample,) = await generate(client, ask(prompt(), newest=1))
        assert sample.token_ids.tolist() == expected_tokens(prompt(), 7, 6, salt=salt)
        assert engine_of(server).num_starts == 2
