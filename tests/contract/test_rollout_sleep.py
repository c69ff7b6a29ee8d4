"""A rollout server that sleeps draws nothing, takes weights only where it has room for them, and comes back."""

from __future__ import annotations

import asyncio

import grpc
import httpx
import pytest

from kdmesh import errors
from kdmesh.rpc.channel import open_channel
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.types import EVERY_TAG, Sampling, SleepTag
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from kdmesh.weights.manifest import UpdatePolicy
from tests.contract.test_rollout_weights import publish, until_verified, weights
from tests.support.rollout_samples import ask, expected_tokens, generate, generating, prompt
from tests.support.rollout_server import running_rollout

ASLEEP = "the server sleeps (weights, kv_cache given back); wake it"


async def test_a_sleeping_rollout_server_refuses_at_once_with_the_reason_and_samples_when_woken() -> None:
    async with running_rollout() as server, server.client() as client, httpx.AsyncClient() as http:
        await client.sleep(EVERY_TAG, drain_s=5)
        with pytest.raises(errors.Unavailable) as refusal:
            await generate(client, ask(prompt()))
        assert (str(refusal.value), refusal.value.retry_after_s) == (ASLEEP, 1.0)
        ready = await http.get(f"http://{server.addresses.rest}/readyz")
        assert (ready.status_code, ready.json()) == (503, {"reason": ASLEEP})
        told = (await http.get(f"http://{server.addresses.rest}/metrics")).text
        assert 'kdmesh_rollout_asleep{tag="weights"} 1.0' in told
        async with server.client() as other:
            await other.wake(EVERY_TAG)
        (sample,) = await generate(client, ask(prompt()))
        assert sample.token_ids.tolist() == expected_tokens(prompt(), 7, 6)


async def test_samples_under_way_are_finished_before_sleep_and_those_that_wait_are_refused() -> None:
    async with running_rollout(engine={"max_running": 1}) as server, server.client() as client:
        server.engine.hold()
        running, waiting = generating(client, ask(prompt())), generating(client, ask(prompt(seed=1)))
        await server.until(running=1, waiting=1)
        sleeping = asyncio.create_task(client.sleep(EVERY_TAG, drain_s=5))
        with pytest.raises(errors.Unavailable, match="goes to sleep"):
            await waiting
        assert not sleeping.done()
        server.engine.let_go()
        (sample,) = await running
        assert sample.token_ids.tolist() == expected_tokens(prompt(), 7, 6)
        await sleeping


async def test_samples_that_take_too_long_keep_the_server_awake() -> None:
    async with running_rollout() as server, server.client() as client:
        server.engine.hold()
        running = generating(client, ask(prompt()))
        await server.until(running=1)
        with pytest.raises(errors.DeadlineExpired, match=r"did not finish within 0\.05 s"):
            await client.sleep(EVERY_TAG, drain_s=0.05)
        server.engine.let_go()
        await running
        await generate(client, ask(prompt()))


async def test_weights_are_taken_while_only_the_cache_sleeps_and_refused_while_they_sleep_themselves() -> None:
    async with running_rollout() as server, server.client() as client:
        new, salt = weights(1)
        await client.sleep(EVERY_TAG, drain_s=5)
        channel = open_channel(server.addresses.grpc)
        refused = RolloutStub(channel).UpdateWeights()
        assert (await refused.code(), await refused.details()) == (grpc.StatusCode.UNAVAILABLE, ASLEEP)
        await channel.close()
        await client.wake(frozenset({SleepTag.WEIGHTS}))
        await publish(server, 1, new, UpdatePolicy.FINISH)
        with pytest.raises(errors.Unavailable, match=r"sleeps \(kv_cache given back\)"):
            await generate(client, ask(prompt()))
        await client.wake(EVERY_TAG)
        (sample,) = await generate(client, ask(prompt(), newest=1))
        assert sample.token_ids.tolist() == expected_tokens(prompt(), 7, 6, salt=salt)


async def test_an_update_that_is_received_is_finished_before_sleep() -> None:
    async with running_rollout() as server, server.client() as client:
        new, _ = weights(1)
        server.engine.hold()
        running = generating(client, ask(prompt()))
        await server.until(running=1)
        publishing = asyncio.create_task(publish(server, 1, new, UpdatePolicy.FINISH))
        await until_verified(server)
        sleeping = asyncio.create_task(client.sleep(EVERY_TAG, drain_s=10))
        with pytest.raises(errors.Unavailable, match="goes to sleep"):
            await generate(client, ask(prompt()))
        server.engine.let_go()
        await running
        await publishing
        await sleeping
        assert (await server.queue())["weights"] == {"version": 1, "state": "serving"}


async def test_a_pool_puts_its_servers_to_sleep_and_one_that_sleeps_when_it_comes_is_woken() -> None:
    async with running_rollout() as server:

        def use() -> None:
            with RolloutPool([server.addresses.grpc], job="a", deadline_s=10) as pool:
                pool.sleep()
            with RolloutPool([server.addresses.grpc], job="b", deadline_s=10) as pool:  # as after a run that was killed
                pending = pool.submit(prompt(), Sampling(max_new_tokens=6), num_samples=1, seed=7)
                pool.wake()
                (sample,) = pending.wait()
                assert sample.token_ids.tolist() == expected_tokens(prompt(), 7, 6)

        await asyncio.to_thread(use)
