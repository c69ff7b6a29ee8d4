"""Several teachers that do the same: they come and go by name, the sick are left, the near are preferred."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmesh.errors import DeadlineExpired, EngineFailure, ModelMismatch
from kdmesh.rpc.fleet.discovery import Discovery
from kdmesh.rpc.fleet.replicas import Replicas
from kdmesh.rpc.fleet.routing import RoutingPolicy
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient, TeacherRows
from kdmesh.rpc.teachers.doors import DoorChoice
from kdmesh.rpc.teachers.fleet import TeacherFleet
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.types import ServerLoad
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import RunningTeacher, running_teacher

PROMPT = RoutingPolicy(look_every_s=0.02, slow_start_s=0, ejected_s=0.2)


class Names:
    """Resolves every name to what a test says."""

    def __init__(self, *teachers: RunningTeacher) -> None:
        self.addresses: Sequence[str] = [one.addresses.grpc for one in teachers]
        self.error: OSError | None = None
        self.asked: list[tuple[str, int]] = []

    async def resolve(self, name: str, port: int) -> Sequence[str]:
        self.asked.append((name, port))
        if self.error is not None:
            raise self.error
        return self.addresses


@contextlib.asynccontextmanager
async def fleet(
    discovery: Discovery, *, door: DoorChoice = "stream", routing: RoutingPolicy = PROMPT, deadline_s: float = 20
) -> AsyncIterator[TeacherFleet]:
    opened = TeacherFleet(discovery, SessionOptions(job="test", door=door), routing=routing)
    try:
        await opened.start(Deadline.after(deadline_s))
        yield opened
    finally:
        await opened.close()


def named(names: Names) -> Discovery:
    return Discovery(["dns:///teachers.example:50051"], names.resolve)


def listed(*teachers: RunningTeacher) -> Discovery:
    return Discovery([one.addresses.grpc for one in teachers])


async def ask(opened: TeacherFleet, num_tokens: int = 9, *, seed: int = 0) -> TeacherRows:
    asked = sequence(num_tokens, seed=seed)
    rows = await opened.ask([asked], Deadline.after(20), weight_version=1)
    assert torch.equal(rows.rows_RD, expected_rows([asked]))
    return rows


async def until_answered_by(opened: TeacherFleet, teacher: RunningTeacher) -> None:
    before = len(teacher.engine.batches)
    while len(teacher.engine.batches) == before:
        await ask(opened)


def on(host: str) -> dict[str, object]:
    return {"host": host}


async def test_a_teacher_that_joins_its_name_gets_requests(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path / "1", server=on("127.0.0.1")) as first,
        running_teacher(tmp_path / "2", server=on("127.0.0.2")) as second,
    ):
        names, own = Names(first), len(second.engine.batches)
        async with fleet(named(names)) as opened:
            await ask(opened)
            assert names.asked[0] == ("teachers.example", 50051)
            assert len(second.engine.batches) == own
            names.addresses = [first.addresses.grpc, second.addresses.grpc]
            await until_answered_by(opened, second)
            assert opened.imbalance is not None


async def test_a_teacher_that_leaves_its_name_answers_what_it_has_and_no_more(tmp_path: Path) -> None:
    async with running_teacher(tmp_path / "1") as first, running_teacher(tmp_path / "2") as second:
        names = Names(first)
        async with fleet(named(names)) as opened:
            first.engine.hold()
            last = asyncio.create_task(ask(opened))
            await asyncio.to_thread(first.engine.wait_entered)
            names.addresses = [second.addresses.grpc]
            while opened._replicas.addresses != {second.addresses.grpc}:
                await opened._replicas._change()
            for seed in range(4):
                await ask(opened, seed=seed)
            assert not last.done()
            first.engine.let_go()
            await last
            asked = len(first.engine.batches)
            while len(opened._replicas.clients) > 1:
                await ask(opened)
            assert len(first.engine.batches) == asked


async def test_a_name_that_is_not_found_for_a_while_changes_nothing(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        names = Names(teacher)
        async with fleet(named(names)) as opened:
            names.error = OSError("no such name")
            looks = len(names.asked)
            while len(names.asked) < looks + 3:
                await ask(opened)


async def test_a_name_that_was_never_found_is_named_with_the_reason() -> None:
    names = Names()
    names.error = OSError("no such name")
    with pytest.raises(DeadlineExpired, match=r"no teacher is ready .*dns:///teachers.example:50051: no such name"):
        async with fleet(named(names), deadline_s=0.2):
            pass


async def test_a_teacher_of_another_model_that_joins_later_gets_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        running_teacher(tmp_path / "1") as first,
        running_teacher(tmp_path / "2", engine={"hidden_size": 16}) as other,
    ):
        names, own = Names(first), len(other.engine.batches)
        async with fleet(named(names)) as opened:
            names.addresses = [first.addresses.grpc, other.addresses.grpc]
            while not any(record.message == "server refused" for record in caplog.records):
                await ask(opened)
            (refused,) = [record for record in caplog.records if record.message == "server refused"]
            said = refused.__dict__
            assert said["address"] == other.addresses.grpc
            assert "fa4e00000010" in said["reason"]  # its own, and
            assert "fa4e00000008" in said["reason"]  # what is wanted
            await ask(opened)
            assert len(other.engine.batches) == own
        with pytest.raises(ModelMismatch):
            async with fleet(listed(first, other)):
                pass


async def test_what_other_clients_have_sent_counts(tmp_path: Path) -> None:
    async with running_teacher(tmp_path / "1") as one, running_teacher(tmp_path / "2") as two, one.client() as other:
        one.engine.hold()
        elsewhere = [asyncio.create_task(other.prefill([sequence(200)], Deadline.after(20))) for _ in range(2)]
        await until_waiting(other, 400)
        async with fleet(listed(one, two)) as opened:
            for seed in range(8):
                await ask(opened, seed=seed)
        one.engine.let_go()
        await asyncio.gather(*elsewhere)
        load = await other.ask_load()
        assert load.waiting_tokens == 0
        assert load.tokens_per_s is not None


async def test_replies_say_what_the_server_has_to_do(tmp_path: Path) -> None:
    loads: list[ServerLoad] = []
    async with running_teacher(tmp_path) as teacher:
        client = await TeacherClient.connect(
            teacher.addresses.grpc, SessionOptions(job="test", door="stream"), on_load=loads.append
        )
        await client.prefill([sequence(9)], Deadline.after(20))
        await client.close()
    (load,) = loads
    assert load.waiting_tokens == 0
    assert 0 < load.recent_tokens <= 9


async def test_a_teacher_whose_memory_is_this_node_s_is_preferred_within_the_bound(tmp_path: Path) -> None:
    routing = RoutingPolicy(slow_start_s=0, local_tokens=100)
    async with running_teacher(tmp_path / "1") as near, running_teacher(tmp_path / "2") as far:
        own = len(far.engine.batches)
        for path in far_sockets(tmp_path / "2"):
            path.rename(path.with_suffix(".elsewhere"))  # as on another node
        async with fleet(listed(near, far), door="auto", routing=routing) as opened:
            assert set(opened.doors) == {"shm", "stream"}
            for seed in range(8):
                await ask(opened, seed=seed)
            assert len(far.engine.batches) == own
            near.engine.hold()
            waiting = []
            async with near.client() as other:
                for tokens in (60, 120):  # of which the last makes more than 100 more than elsewhere
                    waiting.append(asyncio.create_task(ask(opened, 60)))
                    await until_waiting(other, tokens)
            await ask(opened, 60)
            assert len(far.engine.batches) == own + 1
            near.engine.let_go()
            await asyncio.gather(*waiting)


async def until_waiting(client: TeacherClient, num_tokens: int) -> None:
    async with asyncio.timeout(20):
        while (await client.ask_load()).waiting_tokens < num_tokens:
            pass  # each look is a round trip through the server's loop


def far_sockets(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_socket()]


async def test_a_failure_of_one_is_answered_by_the_other_and_many_eject_it(tmp_path: Path) -> None:
    routing = RoutingPolicy(slow_start_s=0, max_failures=1, ejected_s=0.2)
    async with (
        running_teacher(tmp_path / "1") as sick,
        running_teacher(tmp_path / "2") as well,
        fleet(listed(sick, well), routing=routing) as opened,
    ):
        sick.engine.failures = [ValueError("broken")]
        while sick.engine.failures:
            await ask(opened)
        assert opened.retries == 1
        assert opened._replicas._router.is_on_trial(sick.addresses.grpc)
        await until_answered_by(opened, sick)  # its trial
        assert not opened._replicas._router.is_on_trial(sick.addresses.grpc)


async def test_a_request_that_every_teacher_fails_on_fails(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path / "1") as one,
        running_teacher(tmp_path / "2") as two,
        fleet(listed(one, two)) as opened,
    ):
        one.engine.failures = [ValueError("poison")]
        two.engine.failures = [ValueError("poison")]
        with pytest.raises(EngineFailure):
            await ask(opened)
        assert (one.engine.failures, two.engine.failures) == ([], [])


async def test_a_second_is_asked_when_the_first_takes_long_and_the_late_answer_gives_its_slot_back(
    tmp_path: Path,
) -> None:
    routing = RoutingPolicy(slow_start_s=0, hedge_after_s=0.05)
    async with (
        running_teacher(tmp_path / "1") as slow,
        running_teacher(tmp_path / "2") as quick,
        fleet(listed(slow, quick), routing=routing) as opened,
    ):
        slow.engine.hold()
        before = len(slow.engine.batches)
        while len(slow.engine.batches) == before:
            await ask(opened)  # answered by the quick one, in any case
        slow.engine.let_go()
        async with slow.client() as other:  # gets every slot there is
            kept = [await other.prefill([sequence(9, seed=seed)], Deadline.after(20)) for seed in range(4)]
        assert len(kept) == 4


async def test_who_waits_looks_again_only_when_something_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routing = RoutingPolicy(slow_start_s=0, hedge_after_s=0.01)
    looks = 0
    judge = Replicas._change

    async def counted(replicas: Replicas[Any]) -> None:
        nonlocal looks
        looks += 1
        await judge(replicas)

    async with running_teacher(tmp_path) as teacher, fleet(listed(teacher), routing=routing) as opened:
        teacher.engine.hold()
        monkeypatch.setattr(Replicas, "_change", counted)
        asked = asyncio.create_task(ask(opened))  # nobody else can be asked when it takes long
        await asyncio.wait({asked}, timeout=0.5)
        teacher.engine.let_go()
        await asked
    assert looks < 20
