"""Samples over the wire: what was asked for, as it finishes, and nothing after it is not wanted any more."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kdmesh import errors
from kdmesh.types import FinishReason
from kdmesh.v1 import rollout_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from kdmesh_rollout.fake_engine import text_of, token_at
from tests.support.rollout_samples import ask, expected_tokens, generate, generating, prompt
from tests.support.rollout_server import running_rollout


async def test_samples_are_those_of_the_prompt_the_seed_and_the_place() -> None:
    async with running_rollout() as server, server.client() as client:
        ids = prompt(7)
        samples = await generate(client, ask(ids, samples=20, seed=100))
        assert [s.token_ids.tolist() for s in samples] == [expected_tokens(ids, 100 + i, 6) for i in range(20)]
        first = [token_at(ids, 100, place, salt=0, vocabulary_size=60)[1] for place in range(6)]
        np.testing.assert_array_equal(samples[0].logprobs, np.array(first, np.float32))
        assert {s.finish_reason for s in samples} == {FinishReason.LENGTH}
        assert {(s.min_weight_version, s.max_weight_version) for s in samples} == {(0, 0)}


async def test_without_a_seed_every_sample_differs() -> None:
    async with running_rollout() as server, server.client() as client:
        samples = await generate(client, ask(prompt(), samples=8, seed=None))
        assert len({tuple(s.token_ids.tolist()) for s in samples}) == 8


async def test_a_stop_token_is_the_last_token() -> None:
    async with running_rollout() as server, server.client() as client:
        ids = prompt()
        whole = expected_tokens(ids, 7, 6)
        (sample,) = await generate(client, ask(ids, stop_token_ids=(whole[3],)))
        assert sample.finish_reason is FinishReason.STOP
        assert sample.token_ids.tolist() == whole[: whole.index(whole[3]) + 1]


async def test_a_response_is_cut_after_the_token_that_completes_a_stop_string() -> None:
    async with running_rollout() as server, server.client() as client:
        ids = prompt()
        whole = expected_tokens(ids, 7, 6)
        across = text_of(whole[2:4])[1:-1]  # begins and ends inside tokens
        (sample,) = await generate(client, ask(ids, stop_strings=("never", across)))
        assert (sample.finish_reason, sample.token_ids.tolist()) == (FinishReason.STOP, whole[:4])


async def test_a_response_ends_at_the_models_limit_and_nothing_is_appended() -> None:
    async with running_rollout() as server, server.client() as client:
        ids = prompt(60)
        (sample,) = await generate(client, ask(ids, max_new_tokens=50))
        assert (sample.finish_reason, sample.token_ids.tolist()) == (FinishReason.LENGTH, expected_tokens(ids, 7, 4))


async def test_samples_come_one_by_one_as_they_finish() -> None:
    async with running_rollout(engine={"max_running": 1}) as server, server.client() as client:
        server.engine.hold()
        arrived: asyncio.Queue[int] = asyncio.Queue()
        wanted = ask(prompt(), samples=2, max_new_tokens=3)
        running = generating(client, wanted, on_sample=lambda index, sample: arrived.put_nowait(index))
        server.engine.allow(3)
        assert await asyncio.wait_for(arrived.get(), 5) == 0
        assert not running.done()
        server.engine.allow(3)
        assert await asyncio.wait_for(arrived.get(), 5) == 1
        await running


async def test_a_new_request_joins_between_two_steps() -> None:
    async with running_rollout() as server, server.client() as client:
        server.engine.hold()
        first = generating(client, ask(prompt()))
        await asyncio.to_thread(server.engine.wait_entered)
        second = generating(client, ask(prompt(seed=1), max_new_tokens=2))
        await server.until(running=1, waiting=1)
        server.engine.steps.clear()
        server.engine.allow(3)
        await second  # joined after the first's first step, and is done before it
        assert not first.done()
        assert server.engine.steps[:2] == [2, 2]
        server.engine.let_go()
        assert (await first)[0].token_ids.tolist() == expected_tokens(prompt(), 7, 6)


async def test_an_aborted_request_leaves_the_engine_and_the_queue() -> None:
    async with running_rollout(engine={"max_running": 2}) as server, server.client() as client:
        server.engine.hold()
        unwanted = generating(client, ask(prompt(), samples=5))
        other = generating(client, ask(prompt(seed=1)))
        await server.until(running=2, waiting=4)
        unwanted.cancel()
        server.engine.let_go()
        assert (await other)[0].token_ids.tolist() == expected_tokens(prompt(seed=1), 7, 6)
        await server.until(running=0)
        assert server.engine.num_running == 0


async def test_the_end_of_a_stream_aborts_its_requests_and_no_others() -> None:
    async with running_rollout() as server, server.client() as other:
        server.engine.hold()
        async with server.client() as client:
            lost = generating(client, ask(prompt(), samples=3))
            await server.until(running=3)
            kept = generating(other, ask(prompt(seed=1)))
            await server.until(running=3, waiting=1)
        with pytest.raises(errors.Unavailable):
            await lost
        await server.until(running=0, waiting=1)
        server.engine.let_go()
        assert (await kept)[0].token_ids.tolist() == expected_tokens(prompt(seed=1), 7, 6)


async def test_a_client_may_close_its_side_and_still_gets_every_reply() -> None:
    async with running_rollout() as server, grpc.aio.insecure_channel(server.addresses.grpc) as channel:
        call = RolloutStub(channel).Generate()
        sampling = pb.SamplingParameters(temperature=1, top_p=1, repetition_penalty=1, max_new_tokens=2)
        for number in (1, 2):
            await call.write(
                pb.GenerateRequest(request_id=number, prompt_ids=[1], num_samples=2, sampling=sampling, seed=0)
            )
        await call.done_writing()
        replies = [(reply.request_id, reply.sample.sample_index) async for reply in call]
        assert sorted(replies) == [(1, 0), (1, 1), (2, 0), (2, 1)]


async def test_the_deadline_of_a_request_ends_it() -> None:
    async with running_rollout() as server, server.client() as client:
        server.engine.hold()
        with pytest.raises(errors.DeadlineExpired, match=r"not finished within 0\.05 s"):
            await generate(client, ask(prompt()), deadline_s=0.05)
        server.engine.let_go()
        await server.until(running=0)
        assert (await generate(client, ask(prompt())))[0].num_tokens == 6


async def test_the_servers_own_limit_ends_a_request_too() -> None:
    async with running_rollout(queue={"max_request_s": 0.05}) as server, server.client() as client:
        server.engine.hold()
        with pytest.raises(errors.DeadlineExpired, match=r"not finished within 0\.05 s"):
            await generate(client, ask(prompt()))


async def test_a_sample_counts_for_no_more_tokens_than_the_model_takes() -> None:
    async with running_rollout(engine={"max_running": 1}) as server, server.client() as client:
        server.engine.hold()
        unbounded = generating(client, ask(prompt(), samples=2, max_new_tokens=10**6))
        await server.until(running=1, waiting=1)
        assert (await server.queue())["waiting"]["tokens"] == 64
        server.engine.let_go()
        await unbounded


async def test_a_full_queue_refuses_with_a_wait() -> None:
    async with (
        running_rollout(queue={"max_tokens": 40}, engine={"max_running": 1}) as server,
        server.client() as client,
    ):
        server.engine.hold()
        kept = [generating(client, ask(prompt(), samples=1 + n)) for n in range(2)]
        await server.until(running=1, waiting=2)
        with pytest.raises(errors.Unavailable, match="22 tokens wait, this request has 22, and at most 40") as full:
            await generate(client, ask(prompt(), samples=2))
        assert 0 < full.value.retry_after_s <= 300
        server.engine.let_go()
        await asyncio.gather(*kept)


SAMPLING: dict[str, Any] = {"temperature": 1, "top_p": 1, "repetition_penalty": 1, "max_new_tokens": 4}
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"prompt_ids": []}, {}, "the prompt is empty"),
    ({"prompt_ids": [1] * 64}, {}, "the prompt has 64 tokens, which leaves no room .* at most 64"),
    ({"prompt_ids": [3, 60]}, {}, "the prompt has token id 60; ids must be below 60"),
    ({"prompt_ids": [2**32 - 1]}, {}, "token id 4294967295 exceeds"),
    ({"num_samples": 0}, {}, "num_samples is 0; it must be from 1 to 4096"),
    ({}, {"temperature": -1}, "temperature is -1.0"),
    ({}, {"top_p": 0}, "top_p is 0.0; it must be above 0"),
    ({}, {"min_p": 2}, "min_p is 2.0"),
    ({}, {"repetition_penalty": 0}, "repetition_penalty is 0.0"),
    ({}, {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({}, {"stop_token_ids": [60]}, "stop_token_ids has token id 60; ids must be below 60"),
    ({}, {"stop_strings": [""]}, "stop_strings holds an empty text"),
    ({}, {"stop_token_ids": [1] * 1025}, "stop_token_ids are 1025; at most 1024 are allowed"),
    ({}, {"stop_strings": ["a"] * 257}, "stop_strings are 257; at most 256 are allowed"),
    ({}, {"stop_strings": ["a", "é" * 513]}, "the bytes of a stop string are 1026; at most 1024 are allowed"),
]


@pytest.fixture(scope="module")
def replies_to_bad_requests() -> list[pb.GenerateReply]:
    """One reply to each, all on one stream, which goes on after each failure."""
    return asyncio.run(_replies_to_bad_requests())


async def _replies_to_bad_requests() -> list[pb.GenerateReply]:
    async with running_rollout() as server, grpc.aio.insecure_channel(server.addresses.grpc) as channel:
        call = RolloutStub(channel).Generate()
        for number, (fields, sampling, _) in enumerate(BAD):
            tree = {"request_id": number, "prompt_ids": [1], "num_samples": 1} | fields
            await call.write(pb.GenerateRequest(**tree, sampling=pb.SamplingParameters(**(SAMPLING | sampling))))
        await call.done_writing()
        return sorted([reply async for reply in call], key=lambda reply: reply.request_id)


@pytest.mark.parametrize("number", range(len(BAD)), ids=[message for _, _, message in BAD])
def test_a_bad_request_is_refused_with_the_value_and_the_rule(
    replies_to_bad_requests: list[pb.GenerateReply], number: int
) -> None:
    failure = replies_to_bad_requests[number].failure
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    with pytest.raises(AssertionError, match=BAD[number][2]):
        raise AssertionError(failure.message)


async def test_older_weights_than_wanted_and_another_model_are_refused() -> None:
    async with running_rollout() as server, server.client() as client:
        with pytest.raises(errors.ModelMismatch, match="version 3 or newer; this server has 0"):
            await generate(client, ask(prompt(), newest=3))
        request = pb.GenerateRequest(prompt_ids=[1], num_samples=1, architecture_fingerprint="other")
        with pytest.raises(errors.ModelMismatch, match="the request is for architecture other"):
            await client._stream.ask(request, prompt(), lambda index, sample: None)


async def test_a_number_that_is_taken_ends_the_stream() -> None:
    async with running_rollout() as server, grpc.aio.insecure_channel(server.addresses.grpc) as channel:
        server.engine.hold()
        call = RolloutStub(channel).Generate()
        for _ in range(2):
            await call.write(
                pb.GenerateRequest(
                    request_id=4, prompt_ids=[1], num_samples=1, sampling=pb.SamplingParameters(**SAMPLING)
                )
            )
        with pytest.raises(grpc.aio.AioRpcError, match="request_id 4 is that of a request without an answer"):
            await call.read()
        server.engine.let_go()
        await server.until(running=0)


async def test_an_engine_failure_ends_what_is_under_way_and_nothing_else() -> None:
    async with running_rollout(engine={"max_running": 1}) as server, server.client() as client:
        server.engine.hold()
        doomed = generating(client, ask(prompt()))
        await server.until(running=1, waiting=0)
        waiting = generating(client, ask(prompt(seed=1)))
        await server.until(running=1, waiting=1)
        server.engine.failures.append(RuntimeError("secret of the machine"))
        server.engine.let_go()
        with pytest.raises(errors.EngineFailure, match="the server's log has the details") as failed:
            await doomed
        assert "secret" not in str(failed.value)
        assert (await waiting)[0].token_ids.tolist() == expected_tokens(prompt(seed=1), 7, 6)


async def test_an_engine_that_stays_broken_ends_the_server() -> None:
    async with running_rollout() as server, server.client() as client:
        server.engine.failures += [RuntimeError("broken")] * 9
        with pytest.raises(errors.EngineFailure):
            await generate(client, ask(prompt()))
        with pytest.raises(errors.EngineFailure, match="the engine is broken"):
            await server.ended


async def test_metrics_parse_and_count() -> None:
    async with running_rollout() as server, server.client(job="counted") as client, httpx.AsyncClient() as http:
        await generate(client, ask(prompt(), samples=3))
        with pytest.raises(errors.ModelMismatch):
            await generate(client, ask(prompt(), newest=1))
        text = ""
        async with asyncio.timeout(20):
            while 'outcome="ModelMismatch"' not in text:  # the client may hear of it before it is counted
                text = (await http.get(f"http://{server.addresses.rest}/metrics")).text
    found = {
        (sample.name.removeprefix("kdmesh_rollout_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    job = ("kdmesh_job", "counted")
    assert found["samples_total", (job, ("reason", "length"))] == 3
    assert found["tokens_total", (job,)] == 18
    assert found["requests_total", (job, ("outcome", "ok"))] == 1
    assert found["requests_total", (job, ("outcome", "ModelMismatch"))] == 1
    assert found["queue_seconds_count", (job,)] == 3
    assert found["running_samples", ()] == found["waiting_samples", ()] == found["weight_version", ()] == 0
    assert found["drawn_tokens_total", ()] == 18 + 6  # and those of the probe at the start
