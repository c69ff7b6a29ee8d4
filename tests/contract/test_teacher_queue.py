"""Waiting for the engine and for slots: fair, bounded, and given up at once when nobody wants the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
import torch

from kdmesh import errors
from kdmesh.handles.slab.ledger import Ledger
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient, TeacherRows
from kdmesh.types import TokenSequence
from kdmesh_teacher.engine import PrefillJob
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import RunningTeacher, running_teacher


def ask(
    client: TeacherClient, sequences: Sequence[TokenSequence], *, deadline_s: float = 10
) -> asyncio.Task[TeacherRows]:
    return asyncio.create_task(client.prefill(sequences, Deadline.after(deadline_s)))


async def waiting_requests(teacher: RunningTeacher) -> int:
    async with httpx.AsyncClient() as http:
        slab = (await http.get(f"http://{teacher.addresses.rest}/v1/slab")).json()
    waiting: int = slab["waiting"]["requests"]
    return waiting


async def until_waiting(teacher: RunningTeacher, count: int) -> None:
    async with asyncio.timeout(5):
        while await waiting_requests(teacher) != count:
            pass  # each look is a round trip through the server's loop


async def hold_engine(teacher: RunningTeacher, client: TeacherClient) -> asyncio.Task[TeacherRows]:
    """The engine holds the batch of one request, so that whatever comes now waits."""
    teacher.engine.hold()
    held = ask(client, [sequence(5)])
    await asyncio.to_thread(teacher.engine.wait_entered)
    return held


async def test_job_that_holds_all_its_slots_delays_no_other(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, slab={"slots_per_session": 2}) as teacher,
        teacher.client(job="hoarder", door="shm") as hoarder,
        teacher.client(job="other", door="shm") as other,
    ):
        kept = [await ask(hoarder, [sequence(9, seed=seed)]) for seed in range(2)]
        stuck = ask(hoarder, [sequence(9, seed=7)])
        await until_waiting(teacher, 1)
        for seed in range(5):
            rows = await ask(other, [sequence(9, seed=seed)])
            assert torch.equal(rows.rows_RD, expected_rows([sequence(9, seed=seed)]))
            del rows
        assert not stuck.done()
        kept.clear()  # the last view dies: its slot is free
        assert torch.equal((await stuck).rows_RD, expected_rows([sequence(9, seed=7)]))


async def test_sessions_take_turns(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, engine={"max_batch_tokens": 20}) as teacher,
        teacher.client(job="many") as many,
        teacher.client(job="few") as few,
    ):
        held = await hold_engine(teacher, few)
        computed: list[int] = []
        prefill = teacher.engine.prefill

        def noted(jobs: Sequence[PrefillJob]) -> None:
            computed.extend(job.num_rows for job in jobs)
            prefill(jobs)

        teacher.engine.prefill = noted  # type: ignore[method-assign]
        asked = [ask(many, [sequence(18)]) for _ in range(6)]
        await until_waiting(teacher, 6)
        asked += [ask(few, [sequence(17)]) for _ in range(2)]
        await until_waiting(teacher, 8)
        teacher.engine.let_go()
        await asyncio.gather(held, *asked)
        assert sorted(computed) == [16, 16, *[17] * 6]
        assert max(index for index, rows in enumerate(computed) if rows == 16) <= 4


async def test_full_queue_refuses_with_a_wait_that_was_measured(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, queue={"max_tokens": 100}) as teacher,
        teacher.client() as client,
    ):
        held = await hold_engine(teacher, client)
        waiting = ask(client, [sequence(90)])
        await until_waiting(teacher, 1)
        with pytest.raises(errors.Unavailable, match="90 tokens wait, this request has 20, and at most 100") as full:
            await ask(client, [sequence(20)])
        assert full.value.retry_after_s == 1.0  # no batch was measured yet
        teacher.engine.let_go()
        await held
        await waiting

        teacher.engine.hold()
        held = ask(client, [sequence(5)])
        await asyncio.to_thread(teacher.engine.wait_entered)
        waiting = ask(client, [sequence(90)])
        await until_waiting(teacher, 1)
        with pytest.raises(errors.Unavailable) as full:
            await ask(client, [sequence(20)])
        # 10 tokens too many, at the speed of the two batches above.
        assert 0.01 <= full.value.retry_after_s < 1.0
        teacher.engine.let_go()
        await asyncio.gather(held, waiting)


async def test_no_slot_within_the_bounded_wait_is_unavailable_with_the_slabs_state(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, queue={"max_wait_s": 0.2}, slab={"slots": 2}) as teacher,
        teacher.client(door="shm") as keeper,
        teacher.client(door="shm") as other,
    ):
        kept = [await ask(keeper, [sequence(9)]) for _ in range(2)]
        with pytest.raises(errors.Unavailable, match="no slot came free; of 2 slots are 2 held") as refused:
            await ask(other, [sequence(9)])
        assert refused.value.retry_after_s == 1.0
        del kept
        assert (await ask(other, [sequence(9)])).rows_RD.shape == (8, 8)


async def test_end_of_a_wait_for_a_slot_looks_at_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Ledger] = []
    async with (
        running_teacher(tmp_path, queue={"max_wait_s": 0.2}, slab={"slots": 1}) as teacher,
        teacher.client(door="shm") as keeper,
        teacher.client(door="shm") as other,
    ):
        kept = await ask(keeper, [sequence(9)])
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "sessions", lambda ledger: looks.append(ledger) or ())
            with pytest.raises(errors.Unavailable, match="no slot came free; of 1 slots are 1 held"):
                await ask(other, [sequence(9)])
        del kept
    assert not looks


async def test_session_at_its_share_is_told_so(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, queue={"max_wait_s": 0.2}, slab={"slots_per_session": 1}) as teacher,
        teacher.client(door="shm") as client,
    ):
        kept = await ask(client, [sequence(9)])
        with pytest.raises(errors.Unavailable, match="its share of 1 slots"):
            await ask(client, [sequence(9)])
        del kept


async def test_deadline_of_the_caller_ends_its_wait(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client:
        held = await hold_engine(teacher, client)
        with pytest.raises(errors.DeadlineExpired, match=r"did not start within 0\.1 s: 30 tokens waited"):
            await ask(client, [sequence(30)], deadline_s=0.1)
        assert await waiting_requests(teacher) == 0
        teacher.engine.let_go()
        await held


async def test_cancelled_requests_leave_the_queue_and_the_slab(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        async with teacher.client() as client, teacher.client() as other:
            held = await hold_engine(teacher, client)
            waiting = ask(client, [sequence(9)])
            await until_waiting(teacher, 1)
            other_waits = ask(other, [sequence(9)])
            await until_waiting(teacher, 2)
            await client.close()  # its stream breaks
            for task in (held, waiting):
                with pytest.raises(errors.Unavailable):
                    await task
            await until_waiting(teacher, 1)
            teacher.engine.let_go()
            assert (await other_waits).rows_RD.shape == (8, 8)
        async with httpx.AsyncClient() as http:
            slab = (await http.get(f"http://{teacher.addresses.rest}/v1/slab")).json()
        assert slab["slots"] == {"free": 4, "filling": 0, "ready": 0, "held": 0, "abandoned": 0}


async def test_answer_that_nobody_waits_for_is_released(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, slab={"slots": 1}) as teacher, teacher.client(door="shm") as client:
        held = await hold_engine(teacher, client)
        held.cancel()
        teacher.engine.let_go()
        rows = await ask(client, [sequence(9, seed=3)])  # the only slot has come back
        assert torch.equal(rows.rows_RD, expected_rows([sequence(9, seed=3)]))


async def test_engine_failure_ends_its_batch_and_nothing_else(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, slab={"slots": 1}) as teacher, teacher.client() as client:
        teacher.engine.failures.append(RuntimeError("secret of the machine"))
        with pytest.raises(errors.EngineFailure, match="the server's log has the details") as failed:
            await ask(client, [sequence(9)])
        assert "secret" not in str(failed.value)
        assert torch.equal((await ask(client, [sequence(9)])).rows_RD, expected_rows([sequence(9)]))


async def test_engine_that_stays_broken_ends_the_server(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client:
        teacher.engine.failures += [RuntimeError("broken")] * 9
        with pytest.raises(errors.EngineFailure):
            await ask(client, [sequence(9)])
        with pytest.raises(errors.EngineFailure, match="the engine is broken"):
            await teacher.ended
