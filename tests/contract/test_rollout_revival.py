"""A rollout server whose engine dies is not ready at once, and samples again from its first weights."""

from __future__ import annotations

import asyncio
import threading

import grpc
import httpx
import pytest

from kdmesh import errors
from kdmesh.v1 import weights_pb2
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from kdmesh.weights.manifest import UpdatePolicy
from tests.contract.test_rollout_weights import begin, publish, until_verified, weights
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


async def test_a_dead_engine_does_not_wait_for_the_weights_that_it_is_being_given() -> None:
    async with running_rollout(MortalEngine) as server, server.client() as client:
        async with grpc.aio.insecure_channel(server.addresses.grpc) as channel:
            silent = RolloutStub(channel).UpdateWeights()
            await silent.write(weights_pb2.UpdateWeightsRequest(begin=begin(version=1)))
            await silent.read()
            engine_of(server).kill()
            with pytest.raises(grpc.aio.AioRpcError, match="the server's engine died") as ended:
                await silent.read()
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        await until_ready(server)
        new, salt = weights(1)
        await publish(server, 1, new, UpdatePolicy.FINISH)
        (sample,) = await generate(client, ask(prompt(), newest=1))
        assert sample.token_ids.tolist() == expected_tokens(prompt(), 7, 6, salt=salt)


async def test_no_weights_are_taken_while_an_engine_is_started() -> None:
    starting, may_start = threading.Event(), threading.Event()

    class SlowEngine(MortalEngine):
        def restart(self) -> None:
            starting.set()
            assert may_start.wait(10)
            super().restart()

    async with running_rollout(SlowEngine) as server:
        engine_of(server).kill()
        await asyncio.to_thread(starting.wait, 10)
        async with grpc.aio.insecure_channel(server.addresses.grpc) as channel:
            early = RolloutStub(channel).UpdateWeights()
            with pytest.raises(grpc.aio.AioRpcError, match="the server's engine died"):  # before it has read, or after
                await early.write(weights_pb2.UpdateWeightsRequest(begin=begin(version=1)))
                await early.read()
        may_start.set()
        await until_ready(server)
        await publish(server, 1, weights(1)[0], UpdatePolicy.FINISH)
