"""New weights over the wire: when they are served, and what becomes of samples that are being drawn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch

from kdmesh import errors
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.types import DType
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from kdmesh.weights.manifest import TensorSpec, UpdatePolicy
from kdmesh.weights.packing import Weights
from kdmesh_rollout.fake_engine import salt_of
from tests.support.free_port import free_port
from tests.support.rollout_samples import ask, expected_tokens, generate, generating, prompt
from tests.support.rollout_server import RunningRollout, running_rollout

FINGERPRINT = "fa4e0000003cfloat32"


def weights(version: int) -> tuple[Weights, int]:
    """Some for the fake engine, and what stands for them."""
    generator = torch.Generator().manual_seed(version)
    tensors = {"embed.weight": torch.randn(60, 8, generator=generator), "norm.weight": torch.randn(8)}
    listed: Any = [
        (TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DType.FLOAT32), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    return listed, salt_of([tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors.values()])


async def publish(
    server: RunningRollout, version: int, new: Weights, policy: UpdatePolicy, *, deadline_s: float = 20
) -> None:
    def send() -> None:
        with WeightSender([server.addresses.grpc], bucket_bytes=2**20, deadline_s=deadline_s) as sender:
            sender.publish(version, FINGERPRINT, new, policy)

    await asyncio.to_thread(send)


async def until_verified(server: RunningRollout) -> None:
    async with asyncio.timeout(10):
        while (await server.queue())["weights"]["state"] != "verified":
            pass  # each look is a round trip through the server's loop


async def test_samples_are_of_the_new_weights_once_they_are_published() -> None:
    async with running_rollout() as server, server.client() as client:
        for version in (2, 5):
            new, salt = weights(version)
            await publish(server, version, new, UpdatePolicy.FINISH)
            (sample,) = await generate(client, ask(prompt(), newest=version))
            assert sample.token_ids.tolist() == expected_tokens(prompt(), 7, 6, salt=salt)
            assert (sample.min_weight_version, sample.max_weight_version) == (version, version)
        assert (await server.queue())["weights"] == {"version": 5, "state": "serving"}


async def test_finish_lets_samples_end_on_the_old_weights_and_new_ones_wait() -> None:
    async with running_rollout() as server, server.client() as client:
        new, salt = weights(1)
        server.engine.hold()
        old = generating(client, ask(prompt()))
        await server.until(running=1)
        publishing = asyncio.create_task(publish(server, 1, new, UpdatePolicy.FINISH))
        await until_verified(server)
        late = generating(client, ask(prompt(seed=1)))
        await server.until(running=1, waiting=1)
        server.engine.allow(5)  # one more is needed
        await asyncio.to_thread(server.engine.wait_entered)
        assert not publishing.done()
        assert (await server.queue())["weights"]["version"] == 0
        server.engine.let_go()
        (sample,) = await old
        assert sample.token_ids.tolist() == expected_tokens(prompt(), 7, 6)
        assert sample.max_weight_version == 0
        await publishing
        (sample,) = await late
        assert sample.token_ids.tolist() == expected_tokens(prompt(seed=1), 7, 6, salt=salt)
        assert sample.min_weight_version == 1


async def test_abort_fails_running_samples_so_that_they_are_asked_for_again() -> None:
    async with running_rollout() as server, server.client() as client:
        new, salt = weights(1)
        server.engine.hold()
        old = generating(client, ask(prompt(), samples=2))
        await server.until(running=2)
        publishing = asyncio.create_task(publish(server, 1, new, UpdatePolicy.ABORT))
        await until_verified(server)
        server.engine.allow(1)
        with pytest.raises(errors.Unavailable, match="an update of the weights aborted this"):
            await old
        await publishing
        server.engine.let_go()
        (sample,) = await generate(client, ask(prompt()))
        assert sample.token_ids.tolist() == expected_tokens(prompt(), 7, 6, salt=salt)
        assert server.engine.num_running == 0


async def test_continue_goes_on_with_the_new_weights_and_reports_both_versions() -> None:
    async with running_rollout() as server, server.client() as client:
        new, salt = weights(3)
        server.engine.hold()
        running = generating(client, ask(prompt()))
        await server.until(running=1)
        publishing = asyncio.create_task(publish(server, 3, new, UpdatePolicy.CONTINUE))
        await until_verified(server)
        server.engine.allow(1)
        await publishing
        server.engine.let_go()
        (sample,) = await running
        expected = expected_tokens(prompt(), 7, 1) + expected_tokens(prompt(), 7, 6, salt=salt)[1:]
        assert sample.token_ids.tolist() == expected
        assert (sample.min_weight_version, sample.max_weight_version) == (0, 3)


async def test_an_update_that_breaks_off_before_its_commit_changes_nothing() -> None:
    async with running_rollout() as server, server.client() as client:
        new, _ = weights(1)
        server.engine.hold()
        running = generating(client, ask(prompt()))
        await server.until(running=1)
        publishing = asyncio.create_task(publish(server, 1, new, UpdatePolicy.FINISH))
        await until_verified(server)
        async with grpc.aio.insecure_channel(server.addresses.grpc) as channel:
            call = RolloutStub(channel).UpdateWeights()
            await call.write(pb.UpdateWeightsRequest(begin=begin(version=2)))
            with pytest.raises(grpc.aio.AioRpcError, match="the update to version 1 is under way"):
                await call.read()
        server.engine.let_go()
        await asyncio.gather(running, publishing)
        async with grpc.aio.insecure_channel(server.addresses.grpc) as channel:
            call = RolloutStub(channel).UpdateWeights()
            await call.write(pb.UpdateWeightsRequest(begin=begin(version=2)))
            assert (await call.read()).weight_version == 1  # type: ignore[union-attr]
            call.cancel()
        async with asyncio.timeout(10):
            while (await server.queue())["weights"]["state"] != "serving":
                pass
        assert (await generate(client, ask(prompt())))[0].max_weight_version == 1


@pytest.mark.parametrize("failure", [RuntimeError("half of it is copied"), errors.EngineFailure("SGLang refuses")])
async def test_weights_that_cannot_be_taken_over_end_the_server(failure: Exception) -> None:
    async with running_rollout() as server, server.client() as client:

        def broken(version: int) -> None:
            raise failure

        server.engine.commit = broken  # type: ignore[method-assign]
        publishing = asyncio.create_task(publish(server, 1, weights(1)[0], UpdatePolicy.FINISH))
        with pytest.raises(errors.EngineFailure, match="new weights could not be taken over"):
            await server.ended
        with pytest.raises(errors.RpcError):
            await generate(client, ask(prompt()))
        publishing.cancel()


async def test_an_update_that_is_withdrawn_in_time_costs_nothing() -> None:
    async with running_rollout() as server, server.client() as client:

        def withdrawn(version: int) -> None:
            raise errors.Withdrawn("the update was withdrawn")

        server.engine.commit, commit = withdrawn, server.engine.commit  # type: ignore[method-assign]
        with pytest.raises(errors.DeadlineExpired):
            await publish(server, 1, weights(1)[0], UpdatePolicy.FINISH, deadline_s=1)
        server.engine.commit = commit  # type: ignore[method-assign]
        await publish(server, 1, weights(1)[0], UpdatePolicy.FINISH)
        assert (await generate(client, ask(prompt())))[0].max_weight_version == 1


async def given_up(sender: WeightSender, call: Callable[[], object]) -> None:
    """Call it in a thread, and give it up until it ends."""
    calling = asyncio.create_task(asyncio.to_thread(call))
    while not calling.done():
        sender.give_up()
        await asyncio.wait([calling], timeout=0.05)
    await calling


async def test_an_update_that_waits_for_samples_can_be_given_up() -> None:
    async with running_rollout() as server, server.client() as client:
        server.engine.hold()
        old = generating(client, ask(prompt()))
        await server.until(running=1)
        with WeightSender([server.addresses.grpc], bucket_bytes=2**20, deadline_s=3600) as sender:
            with pytest.raises(errors.DeadlineExpired, match="within 3600 s"):
                await given_up(sender, lambda: sender.publish(1, FINGERPRINT, weights(1)[0], UpdatePolicy.FINISH))
            server.engine.let_go()
            (sample,) = await old
            assert sample.max_weight_version == 0
            await asyncio.to_thread(sender.publish, 1, FINGERPRINT, weights(1)[0], UpdatePolicy.FINISH)
        assert (await server.queue())["weights"] == {"version": 1, "state": "serving"}


async def test_looking_at_servers_that_do_not_answer_can_be_given_up() -> None:
    with (
        WeightSender([f"127.0.0.1:{free_port()}"], bucket_bytes=2**20, deadline_s=3600) as sender,
        pytest.raises(errors.DeadlineExpired, match="did not answer in time"),
    ):
        await given_up(sender, sender.describe)


def begin(*, version: int) -> pb.BeginUpdate:
    specs = [pb.TensorSpec(name=name, shape=shape, dtype=1) for name, shape in SHAPES.items()]
    return pb.BeginUpdate(version=version, architecture_fingerprint=FINGERPRINT, tensors=specs, policy=1)


SHAPES = {"embed.weight": (60, 8), "norm.weight": (8,)}
