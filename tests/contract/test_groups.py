"""Two processes hand each other bytes through a group of their own, and nobody else gets one."""

from __future__ import annotations

import asyncio
import gc
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from kdmesh.errors import ConfigError, Unavailable
from kdmesh.groups import pair_group
from kdmesh.groups.meeting import SECRET_BYTES, Invitation, Meeting, address_towards, visit
from kdmesh.groups.pair_channel import PairChannel
from kdmesh.groups.pair_group import Backend, PairGroup, Seat
from kdmesh.rpc.weights.sender import WeightSender

HOST = "127.0.0.1"
CPU = torch.device("cpu")


def _join(
    store: Store, secret: bytes, *, rank: int, timeout_s: float = 10, backend: Backend = Backend.GLOO
) -> PairGroup:
    seat = Seat(store=store, secret=secret, rank=rank, backend=backend, device=CPU, host=HOST)
    return PairGroup(seat, timeout_s=timeout_s)


def _first(place: Store, invitation: Invitation, *, timeout_s: float = 10) -> PairGroup:
    return _join(place, invitation.secret, rank=0, timeout_s=timeout_s)


def _second(invitation: Invitation, *, secret: bytes | None = None) -> PairGroup:
    return _join(visit(invitation, timeout_s=10), secret or invitation.secret, rank=1)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@contextmanager
def _pair() -> Iterator[tuple[PairGroup, PairGroup]]:
    meeting = Meeting(HOST, timeout_s=10)
    place, invitation = meeting.invite()
    with _threads() as pool:
        one, other = pool.submit(_first, place, invitation), pool.submit(_second, invitation)
        pair = one.result(20), other.result(20)
    yield pair
    for group in pair:
        group.close()


def _refused(future: Future[PairGroup]) -> str:
    with pytest.raises(Unavailable) as refused:
        future.result(20)
    return str(refused.value)


def _held() -> tuple[int, int]:
    gc.collect()
    process = psutil.Process()
    return process.num_fds(), process.num_threads()


def test_bytes_arrive_in_order() -> None:
    with _pair() as (one, other), _threads() as pool:
        for octets in (b"first", b"a second and longer one"):
            place = torch.zeros(len(octets), dtype=torch.uint8)
            receiving = pool.submit(other.receive, place, 10)
            one.send(memoryview(bytearray(octets)), 10)
            receiving.result(10)
            assert bytes(place.numpy()) == octets


def test_a_group_with_a_stream_moves_bytes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    on: list[object] = []  # there is no GPU here

    @contextmanager
    def stream(own: object) -> Iterator[None]:
        on.append(own)
        yield
        on.remove(own)

    def transferred(group: PairGroup, *_: object) -> None:
        assert on == [group._stream]

    monkeypatch.setattr(torch.cuda, "stream", stream)
    with _pair() as (one, other):
        monkeypatch.setattr(PairGroup, "_transfer", transferred)
        for group in (one, other):
            assert group._stream is None  # gloo, from memory to memory
            group._stream = SimpleNamespace()  # type: ignore[assignment]
        one.send(memoryview(bytearray(8)), 10)
        assert not on
        other.receive(torch.zeros(8, dtype=torch.uint8), 10)
        assert not on


def test_a_group_leaves_nothing_open() -> None:
    with _pair():  # what torch makes once
        pass
    before = _held()
    for _ in range(3):
        with _pair():
            assert _held() > before
    while any(now > then for now, then in zip(_held(), before, strict=True)):
        pass  # torch's threads end a moment later


def test_a_stranger_in_a_seat_of_the_group_gets_no_byte() -> None:
    """Whoever reaches the store reads where the first process listens, but not the secret."""
    meeting = Meeting(HOST, timeout_s=10)
    place, invitation = meeting.invite()
    with _threads() as pool:
        one = pool.submit(_first, place, invitation)
        other = pool.submit(_second, invitation, secret=secrets.token_bytes(SECRET_BYTES))
        assert "does not know its secret" in _refused(other)
        _refused(one)


def test_a_stranger_who_repeats_what_he_was_told_is_noticed() -> None:
    meeting = Meeting(HOST, timeout_s=10)
    place, invitation = meeting.invite()
    half = invitation.secret[: SECRET_BYTES // 2]
    with _threads() as pool:
        one, other = pool.submit(_first, place, invitation), pool.submit(_second, invitation, secret=half + half)
        assert "does not know its secret" in _refused(one)
        other.result(20).close()


def test_a_stranger_who_talks_to_the_store_disturbs_nobody() -> None:
    meeting = Meeting(HOST, timeout_s=10)
    place, invitation = meeting.invite()
    host, _, port = invitation.store_address.rpartition(":")
    with socket.create_connection((host, int(port))) as silent, socket.create_connection((host, int(port))) as loud:
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        with _threads() as pool:
            one, other = pool.submit(_first, place, invitation), pool.submit(_second, invitation)
            one.result(20).close()
            other.result(20).close()
        assert silent.fileno() >= 0


def test_who_never_comes_is_not_waited_for_longer_than_allowed() -> None:
    meeting = Meeting(HOST, timeout_s=0.2)
    place, invitation = meeting.invite()
    with pytest.raises(Unavailable, match="no group of two"):
        _first(place, invitation, timeout_s=0.2)


@pytest.fixture
def gloo_for_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NCCL's group is made of, where there is none."""

    def made(store: Store, rank: int, size: int, options: SimpleNamespace) -> object:
        seat = Seat(store=store, secret=b"", rank=rank, backend=Backend.GLOO, device=CPU, host=HOST)
        return pair_group._gloo(seat, options._timeout)

    made.Options = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setattr(dist, "ProcessGroupNCCL", made, raising=False)


def test_over_nccl_who_never_comes_is_not_waited_for_either(
    gloo_for_nccl: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_group, "_gloo", lambda *_: pytest.fail("NCCL is asked to connect with nobody"))
    meeting = Meeting(HOST, timeout_s=10)
    place, invitation = meeting.invite()
    with pytest.raises(Unavailable, match="no group of two"):
        _join(place, invitation.secret, rank=0, timeout_s=0.2, backend=Backend.NCCL)


def test_over_nccl_both_find_each_other(gloo_for_nccl: None) -> None:
    meeting = Meeting(HOST, timeout_s=10)
    place, invitation = meeting.invite()
    with _threads() as pool:
        one = pool.submit(_join, place, invitation.secret, rank=0, backend=Backend.NCCL)
        there = visit(invitation, timeout_s=10)
        other = pool.submit(_join, there, invitation.secret, rank=1, backend=Backend.NCCL)
        one.result(20).close()
        other.result(20).close()


@pytest.mark.parametrize("end", [PairGroup.abort, PairGroup.close])
def test_who_waits_learns_that_the_other_left(end: Callable[[PairGroup], None]) -> None:
    with _pair() as (one, other), _threads() as pool:
        receiving = pool.submit(other.receive, torch.zeros(8, dtype=torch.uint8), 60)
        if end is PairGroup.abort:
            while other._work is None:
                pass
            end(other)
        else:
            end(one)
        with pytest.raises(Unavailable, match="the group of two broke"):
            receiving.result(20)
        with pytest.raises(Unavailable, match="ended"):
            other.send(memoryview(bytearray(8)), 1)


def test_groups_of_one_meeting_are_strangers_and_leave_nothing_in_it() -> None:
    meeting = Meeting(HOST, timeout_s=10)
    places = [meeting.invite() for _ in range(3)]
    with _threads() as pool:
        firsts = [pool.submit(_first, place, invitation) for place, invitation in places[:2]]
        seconds = [pool.submit(_second, invitation) for _, invitation in places[:2]]
        one, another = (first.result(20) for first in firsts)
        other, yet_another = (second.result(20) for second in seconds)
        one.close()
        with pytest.raises(Unavailable, match="the group of two broke"):
            other.receive(torch.zeros(8, dtype=torch.uint8), 10)
        sending = pool.submit(another.send, memoryview(bytearray(8)), 10)
        yet_another.receive(torch.zeros(8, dtype=torch.uint8), 10)
        sending.result(10)
    store = meeting._store
    assert store.num_keys() > 1
    for _, invitation in places:
        meeting.forget(invitation)
    assert not [key for key in store.list_keys() if key.startswith("pair-")]


def test_who_waits_in_vain_delays_no_other_group_of_the_meeting() -> None:
    meeting = Meeting(HOST, timeout_s=4)
    with _threads() as pool:
        alone = pool.submit(_first, *meeting.invite(), timeout_s=4)
        place, invitation = meeting.invite()
        one, other = pool.submit(_first, place, invitation), pool.submit(_second, invitation)
        one.result(20).close()
        other.result(20).close()
        assert not alone.done()
        _refused(alone)


def test_a_store_that_is_not_there_is_unavailable() -> None:
    with socket.create_server((HOST, 0)) as free:
        address = f"{HOST}:{free.getsockname()[1]}"
    with pytest.raises(Unavailable, match=f"no connection to {address}"):
        visit(Invitation(store_address=address, secret=bytes(SECRET_BYTES)), timeout_s=5)


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1: "):
        WeightSender(["127.0.0.1:1"], advertise="192.0.2.1")


def test_the_way_to_this_machine_is_its_loopback() -> None:
    assert address_towards(HOST) == HOST


async def test_a_group_that_is_never_made_is_not_waited_for_and_is_left_when_it_is_made() -> None:
    let_go, left = threading.Event(), threading.Event()

    def join() -> Any:
        let_go.wait(60)
        return SimpleNamespace(close=left.set)

    channel = PairChannel(join, within_s=0.2)
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"no group of two was made within 0\.2 s"):
            await channel.joined()
    with pytest.raises(Unavailable, match="no group of two was made"):
        await channel.send(memoryview(b"8 octets"), 10)
    await channel.close()
    let_go.set()
    await asyncio.to_thread(left.wait, 20)
    assert left.is_set()


async def test_a_group_that_is_made_in_time_is_used_after_that_time() -> None:
    sent: list[bytes] = []
    group = SimpleNamespace(
        send=lambda data, timeout_s: sent.append(bytes(data)), abort=lambda: None, close=lambda: None
    )
    channel = PairChannel(lambda: group, within_s=20)  # type: ignore[arg-type, return-value]
    await channel.joined()
    channel._until_s = 0.0  # long ago
    await channel.send(memoryview(b"8 octets"), 10)
    await channel.close()
    assert sent == [b"8 octets"]
