"""Weights get from a sender to servers over real connections, through either door."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack

import pytest
import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from kdmesh.errors import ConfigError, DeadlineExpired, InvalidRequest, ModelMismatch, NotFinite, Unavailable
from kdmesh.groups.meeting import Invitation, split_address
from kdmesh.rpc.weights import source as weight_source
from kdmesh.rpc.weights.delivery import Delivery
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.weights.buckets import BucketEntry
from kdmesh.weights.doors import DoorChoice
from kdmesh.weights.manifest import AdapterSpec, LowRankSpec, Manifest, TensorSpec, UpdatePolicy
from kdmesh.weights.packing import Changes, Weights
from tests.support.handles_consumer import until
from tests.support.weight_server import weight_server
from tests.support.weight_targets import FINGERPRINT, MemoryTarget, is_same, makers_of, random_weights

# The largest spans several buckets of 64 KiB; inline, messages of 1 MiB hold several of the others.
SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (700, 1024),
    "empty": (0, 4),
    "norm": (33,),
    "scale": (),
    "up": (65, 129),
}
BUCKET_BYTES = 64 * 1024


def _weights(seed: int) -> dict[TensorSpec, Tensor]:
    return random_weights(SHAPES, seed=seed)


SPECS = list(_weights(0))


def _sender(addresses: Sequence[str], *, door: DoorChoice = "auto", deadline_s: float = 30) -> WeightSender:
    return WeightSender(addresses, bucket_bytes=BUCKET_BYTES, door=door, deadline_s=deadline_s)


async def _publish(sender: WeightSender, version: int, *, policy: UpdatePolicy = UpdatePolicy.FINISH) -> None:
    """Weights of which the version is the seed."""
    await asyncio.to_thread(sender.publish, version, FINGERPRINT, makers_of(_weights(version)), policy)


def _serves(target: MemoryTarget, version: int) -> bool:
    right = all(is_same(target.served[spec.name], tensor) for spec, tensor in _weights(version).items())
    return right and target.version == version and target.staged is None


@pytest.mark.parametrize("door", ["shm", "collective", "inline", "auto"])
async def test_every_version_arrives(door: DoorChoice) -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, updates):
        with _sender([address], door=door) as sender:
            for version in (1, 2, 5):
                await _publish(sender, version)
                assert _serves(target, version) and updates.version == version
    assert all(name.startswith("weights") for name in target.threads)  # never the event loop's
    await until(lambda: not any(thread.name.startswith("weights") for thread in threading.enumerate()))


async def test_several_servers_read_the_same_bucket() -> None:
    targets = [MemoryTarget(SPECS) for _ in range(3)]
    async with AsyncExitStack() as stack:
        addresses = [(await stack.enter_async_context(weight_server(target)))[0] for target in targets]
        with _sender(addresses, door="shm") as sender:
            for version in (1, 2):
                await _publish(sender, version)
                assert all(_serves(target, version) for target in targets)


async def test_a_server_out_of_reach_of_the_memory_gets_it_inline_while_another_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near, far = MemoryTarget(SPECS), MemoryTarget(SPECS)
    connect = weight_source.ShmDoor.connect
    calls = 0

    async def connect_once(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise Unavailable("no shared memory")
        return await connect(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_source.ShmDoor, "connect", connect_once)
    async with weight_server(near) as (one, _), weight_server(far) as (other, _):
        with _sender([one, other]) as sender:
            await _publish(sender, 1)
            assert calls == 2 and _serves(near, 1) and _serves(far, 1)


async def test_a_group_meets_at_the_advertised_address_and_at_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[str, int]] = []
    reach = weight_source.reach

    def look(invitation: Invitation) -> tuple[Store, str]:
        met.append(split_address(invitation.store_address))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", met[-1][1]))
        return reach(invitation)

    monkeypatch.setattr(weight_source, "reach", look)
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, _):
        with WeightSender([address], door="collective", advertise="127.0.0.2", deadline_s=30) as sender:
            await _publish(sender, 1)
    assert [host for host, _ in met] == ["127.0.0.2"] and _serves(target, 1)


async def test_a_collective_door_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(invitation: Invitation) -> tuple[Store, str]:
        raise Unavailable("no way")

    monkeypatch.setattr(weight_source, "reach", reach)
    async with weight_server(MemoryTarget(SPECS)) as (address, _):
        refused = pytest.raises(ConfigError, match=r"door collective, but .* source\.rollouts\.advertise")
        with _sender([address], door="collective") as sender, refused:
            await _publish(sender, 1)


async def test_shared_memory_that_is_asked_for_and_not_to_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*arguments: object) -> object:
        raise Unavailable("no shared memory")

    monkeypatch.setattr(weight_source.ShmDoor, "connect", connect)
    async with weight_server(MemoryTarget(SPECS)) as (address, _):
        refused = pytest.raises(ConfigError, match="cannot reach this process's shared memory")
        with _sender([address], door="shm") as sender, refused:
            await _publish(sender, 1)


async def test_a_bucket_is_filled_while_another_is_copied() -> None:
    """The sender gets ahead of a server that does not copy, by its buffers and no more."""
    filled: list[str] = []
    may_write = asyncio.Event()
    loop = asyncio.get_running_loop()
    sizes = {str(i): (BUCKET_BYTES // 2,) for i in range(8)}
    weights = random_weights(sizes, seed=0)

    class _Waiting(MemoryTarget):
        def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
            asyncio.run_coroutine_threadsafe(may_write.wait(), loop).result()
            super().write(tensor, offset_bytes, data)

    def maker(spec: TensorSpec, tensor: Tensor) -> Callable[[], Tensor]:
        def make() -> Tensor:
            filled.append(spec.name)
            return tensor

        return make

    target = _Waiting(list(weights))
    makers = [(spec, maker(spec, tensor)) for spec, tensor in weights.items()]
    async with weight_server(target) as (address, _):
        with _sender([address]) as sender:
            publishing = asyncio.create_task(asyncio.to_thread(sender.publish, 1, FINGERPRINT, makers))
            await until(lambda: len(filled) >= 3)
            await asyncio.sleep(0.05)
            assert len(filled) == 3
            may_write.set()
            await publishing
    assert filled == list(sizes) and target.version == 1


async def test_what_is_served_changes_only_when_the_policy_has_been_applied() -> None:
    target = MemoryTarget(SPECS)
    applied: list[UpdatePolicy] = []
    is_idle = asyncio.Event()

    async def apply(manifest: Manifest, commit: Callable[[], None]) -> None:
        applied.append(manifest.policy)
        await is_idle.wait()
        await asyncio.to_thread(commit)

    async with weight_server(target, apply=apply) as (address, updates):
        with _sender([address]) as sender:
            publishing = asyncio.create_task(_publish(sender, 1, policy=UpdatePolicy.ABORT))
            await until(lambda: bool(applied))
            assert updates.version == 0 and target.served == {} and not publishing.done()
            is_idle.set()
            await publishing
            assert applied == [UpdatePolicy.ABORT] and _serves(target, 1)


async def test_a_server_that_samples_past_the_deadline_keeps_its_weights_and_is_the_only_one() -> None:
    target, other = MemoryTarget(SPECS), MemoryTarget(SPECS)

    async def never(manifest: Manifest, commit: Callable[[], None]) -> None:
        await asyncio.Event().wait()

    async with weight_server(target, apply=never) as (late, updates), weight_server(other) as (address, _):
        expired = pytest.raises(DeadlineExpired, match=f"version 1 was not taken within 0.5 s by {late}: [^;]*$")
        with _sender([late, address], deadline_s=0.5) as sender, expired:
            await _publish(sender, 1)
        await until(lambda: target.staged is None)
        assert updates.version == 0 and target.served == {} and _serves(other, 1)


async def test_a_server_that_comes_late_gets_the_newest() -> None:
    early, late = MemoryTarget(SPECS), MemoryTarget(SPECS)
    async with AsyncExitStack() as stack:
        one, _ = await stack.enter_async_context(weight_server(early))
        async with weight_server(MemoryTarget(SPECS)) as (free, _):
            port = int(free.rpartition(":")[2])
        with _sender([one, free]) as sender:
            publishing = asyncio.create_task(_publish(sender, 1))
            await until(lambda: early.version == 1)
            await stack.enter_async_context(weight_server(late, port=port))
            await publishing
            assert _serves(early, 1) and _serves(late, 1)


async def test_a_server_that_is_not_there_is_named_and_the_others_are_served() -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(MemoryTarget(SPECS)) as (gone, _):
        pass
    async with weight_server(target) as (address, _):
        with _sender([gone, address], deadline_s=1) as sender:
            with pytest.raises(DeadlineExpired, match=f"within 1 s by {gone}: "):
                await _publish(sender, 1)
            assert _serves(target, 1)


async def test_a_version_that_is_not_newer_is_refused() -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, _):
        with _sender([address]) as sender:
            await _publish(sender, 3)
            with pytest.raises(ModelMismatch, match=f"{address}: version 3 is not newer"):
                await _publish(sender, 3)
            assert _serves(target, 3)


async def test_a_server_without_the_base_gets_it_again_while_another_gets_changes_alone() -> None:
    base, made = _weights(3), list[str]()
    change = LowRankSpec(tensor="up", rank=2, scaling=0.5)
    adapter = AdapterSpec(base=bytes(range(16)), changes=(change,))

    def makers(seed: int) -> tuple[Weights, Changes]:
        factors = {spec: torch.full(spec.shape, float(seed)) for spec in change.factors(SHAPES["up"])}

        def noted(weights: Mapping[TensorSpec, Tensor]) -> Weights:
            return [
                (spec, lambda tensor=tensor, name=spec.name: made.append(name) or tensor)  # type: ignore[misc]
                for spec, tensor in weights.items()
            ]

        return noted(base), Changes(adapter=adapter, factors=noted(factors))

    def serves(target: MemoryTarget, seed: int) -> bool:
        for spec, tensor in base.items():
            expected = (tensor.float() + seed * seed).bfloat16() if spec.name == "up" else tensor
            if not is_same(target.served[spec.name].nan_to_num(7), expected.nan_to_num(7)):
                return False
        return target.version == seed

    first, second, restarted = (MemoryTarget(SPECS) for _ in range(3))
    everything, factors = ["embedding", "norm", "scale", "up", "up.a", "up.b"], ["up.a", "up.b"]
    async with AsyncExitStack() as stack:
        one, _ = await stack.enter_async_context(weight_server(first))
        async with weight_server(second) as (other, _):
            sender = stack.enter_context(_sender([one, other]))
            for seed, expected in ((1, everything), (2, factors)):
                made.clear()
                tensors, changes = makers(seed)
                await asyncio.to_thread(sender.publish, seed, FINGERPRINT, tensors, UpdatePolicy.FINISH, changes)
                assert made == expected and serves(first, seed) and serves(second, seed)
        port = int(other.rpartition(":")[2])
        async with weight_server(restarted, port=port):
            made.clear()
            tensors, changes = makers(3)
            policy = UpdatePolicy.FINISH
            left = await asyncio.to_thread(sender.publish, 3, FINGERPRINT, tensors, policy, changes, needed=1)
            assert made == factors + everything and serves(first, 3) and serves(restarted, 3) and not left
        tensors, changes = makers(4)
        left = await asyncio.to_thread(sender.publish, 4, FINGERPRINT, tensors, policy, changes, needed=1)
        assert serves(first, 4) and left == {other}


async def test_servers_tell_what_they_serve() -> None:
    async with weight_server(MemoryTarget(SPECS)) as (one, _), weight_server(MemoryTarget(SPECS)) as (other, _):
        with _sender([other]) as sender:
            await _publish(sender, 7)
        with _sender([one, other]) as sender:
            served = await asyncio.to_thread(sender.describe)
    assert [(s.address, s.version, s.dtype) for s in served] == [(one, 0, "bfloat16"), (other, 7, "bfloat16")]


@pytest.mark.parametrize("door", ["shm", "collective", "inline"])
async def test_a_byte_that_changes_on_its_way_is_noticed(door: DoorChoice, monkeypatch: pytest.MonkeyPatch) -> None:
    target = MemoryTarget(SPECS)
    hand_over = Delivery.hand_over

    async def corrupt(self: Delivery, buffer: int, entries: tuple[BucketEntry, ...]) -> None:
        """After its digest was taken."""
        self._memory.writable(buffer)[entries[-1].part.end_bytes - 1] ^= 4
        await hand_over(self, buffer, entries)

    async with weight_server(target) as (address, _):
        with _sender([address], door=door) as sender:
            await _publish(sender, 1)
            with monkeypatch.context() as patch:
                patch.setattr(Delivery, "hand_over", corrupt)
                with pytest.raises(InvalidRequest, match="embedding from 0 on are not those sent"):
                    await _publish(sender, 2)
            assert _serves(target, 1)
            await _publish(sender, 3)
            assert _serves(target, 3)


@pytest.mark.parametrize("name", ["embedding", "up"])  # the first, and the last of several buckets
async def test_weights_that_are_not_finite_are_not_sent_and_the_next_version_is(name: str) -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, updates):
        with _sender([address]) as sender:
            await _publish(sender, 1)
            bad = _weights(2)
            next(tensor for spec, tensor in bad.items() if spec.name == name).view(-1)[-1] = float("nan")
            with pytest.raises(NotFinite, match=f"{name} is not finite as bfloat16"):
                await asyncio.to_thread(sender.publish, 2, FINGERPRINT, makers_of(bad))
            await until(lambda: target.staged is None)
            assert _serves(target, 1) and updates.version == 1
            await _publish(sender, 3)
            assert _serves(target, 3)


async def test_nothing_is_left_when_a_tensor_cannot_be_made() -> None:
    target = MemoryTarget(SPECS)

    def fail() -> Tensor:
        raise RuntimeError("no such tensor")

    makers = [*makers_of(_weights(1))[:-1], (SPECS[-1], fail)]
    async with weight_server(target) as (address, _):
        with _sender([address]) as sender:
            with pytest.raises(RuntimeError, match="no such tensor"):
                await asyncio.to_thread(sender.publish, 1, FINGERPRINT, makers)
            await _publish(sender, 1)
            assert _serves(target, 1)
