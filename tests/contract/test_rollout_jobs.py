"""Jobs that share a rollout server: weights and quotas over samples, by the teacher's rules."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from kdmesh.rpc.rollouts.client import RolloutClient
from tests.support.rollout_samples import ask, generating, prompt
from tests.support.rollout_server import RunningRollout, running_rollout


async def put(server: RunningRollout, job: str, terms: dict[str, Any]) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.put(f"http://{server.addresses.rest}/v1/jobs/{job}", json=terms)


async def job_state(server: RunningRollout, job: str) -> dict[str, Any]:
    async with httpx.AsyncClient() as http:
        found: dict[str, Any] = (await http.get(f"http://{server.addresses.rest}/v1/jobs/{job}")).json()
    return found


async def test_a_job_may_have_any_name_that_can_be_printed() -> None:
    for name in ("runs/café", "蒸留 100%", "a b"):
        async with running_rollout() as server, server.client(job=name) as client:
            await generating(client, ask(prompt()))
            async with httpx.AsyncClient() as http:
                listed = (await http.get(f"http://{server.addresses.rest}/v1/jobs")).json()
            assert [job["job"] for job in listed["jobs"]] == [name]


async def test_weights_divide_the_places_of_a_batch() -> None:
    long = {"max_new_tokens": 59}  # a sample is larger than a turn's credit at weight 1
    jobs = {"overrides": {"heavy": {"weight": 4}}}
    async with (
        running_rollout(engine={"max_running": 1}, jobs=jobs) as server,
        server.client(job="light") as light,
        server.client(job="heavy") as heavy,
    ):
        server.engine.hold()
        order: list[str] = []

        async def note(name: str, client: RolloutClient, seed: int) -> None:
            await generating(client, ask(prompt(seed=seed), **long))
            order.append(name)

        async with asyncio.TaskGroup() as asking:
            for number in range(12):
                asking.create_task(note("light", light, number))
            await server.until(running=1, waiting=11)
            for number in range(24):
                asking.create_task(note("heavy", heavy, number))
            await server.until(running=1, waiting=35)
            server.engine.let_go()
    assert 14 <= order[1:21].count("heavy") <= 18


async def test_tokens_in_flight_bound_what_is_decoded_for_a_job() -> None:
    jobs = {"overrides": {"bounded": {"max_tokens_in_flight": 25}}}  # a sample has 11
    async with running_rollout(jobs=jobs) as server, server.client(job="bounded") as client:
        server.engine.hold()
        answers = generating(client, ask(prompt(), samples=5))
        await server.until(running=2, waiting=3)
        state = await job_state(server, "bounded")
        assert (state["tokens_in_flight"], state["waiting_tokens"]) == (22, 33)
        server.engine.let_go()
        assert len(await answers) == 5
        state = await job_state(server, "bounded")
        assert (state["tokens_in_flight"], state["tokens"]) == (0, 30)


async def test_aborted_samples_count_no_longer_and_new_terms_count_at_once() -> None:
    async with (
        running_rollout(jobs={"defaults": {"max_tokens_in_flight": 11}}) as server,
        server.client(job="job") as client,
        server.client(job="job") as other,
    ):
        server.engine.hold()
        unwanted = generating(client, ask(prompt(), samples=2))
        await server.until(running=1, waiting=1)
        wanted = generating(other, ask(prompt(), samples=3))
        await server.until(running=1, waiting=4)
        unwanted.cancel()
        await server.until(running=0, waiting=3)  # the engine is still in a step
        assert (await job_state(server, "job"))["tokens_in_flight"] == 0
        assert (await put(server, "job", {"max_tokens_in_flight": None})).status_code == 200
        server.engine.let_go()
        assert len(await wanted) == 3


async def test_terms_that_a_rollout_server_does_not_know_are_refused() -> None:
    async with running_rollout() as server:
        refused = await put(server, "job", {"max_bytes_in_flight": 5})
        assert refused.status_code == 400
        assert "max_bytes_in_flight" in refused.json()["reason"]
