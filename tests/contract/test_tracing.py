"""Traces: what a step asks for is followed into the servers, and nothing is sent unless somebody wants it."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import sys
from pathlib import Path

import pytest

from kdmesh import log
from kdmesh.errors import ConfigError
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.tracing import spans
from kdmesh.tracing.config import TracingConfig
from kdmesh.tracing.spans import current, span, tracing
from kdmesh.types import Sampling
from tests.contract.test_rollout_weights import FINGERPRINT, weights
from tests.support.rollout_samples import prompt
from tests.support.rollout_server import rollout_process
from tests.support.teacher_process import teacher_process
from tests.support.teacher_requests import sequence
from tests.support.trace_collector import collecting


def test_what_a_step_asks_for_is_followed_into_the_teacher(tmp_path: Path) -> None:
    with collecting() as collector:
        own = {"endpoint": collector.config.endpoint}
        with (
            teacher_process(tmp_path, engine={"seconds_per_batch": 0.05}, tracing=own) as teacher,
            TeacherPool([teacher.grpc], job="traced", deadline_s=20) as pool,
        ):
            with tracing("trainer", collector.config), span("step", step=3):
                pending = pool.submit([sequence(9)])
                rows = pending.wait()
            pool.submit([sequence(5)]).wait()  # nothing is traced here, so nothing there
            del rows, pending
            teacher.signal(signal.SIGTERM)
            assert teacher.process.wait(20) == 0
        spans = collector.all()
    step, rows_span, handle = (spans["kdmesh-trainer", name] for name in ("step", "rows", "handle"))
    request, queue, prefill = (spans["kdmesh-teacher", name] for name in ("prefill request", "queue", "prefill"))
    assert len(spans) == 6
    assert {one.trace_id for one in spans.values()} == {step.trace_id}
    assert (rows_span.parent_span_id, handle.parent_span_id) == (step.span_id, rows_span.span_id)
    assert request.parent_span_id == rows_span.span_id
    assert {queue.parent_span_id, prefill.parent_span_id} == {request.span_id}
    assert rows_span.start_time_unix_nano <= request.start_time_unix_nano <= queue.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano - prefill.start_time_unix_nano >= 0.05e9
    facts = {each.key: each.value for each in request.attributes}
    assert facts["job"].string_value == "traced"
    assert facts["request_id"].int_value == 1
    assert {each.key: each.value.string_value for each in handle.attributes}["door"] == "shm"


def test_samples_and_new_weights_of_a_step_are_followed_into_the_rollout_server(tmp_path: Path) -> None:
    with collecting() as collector:
        own = {"endpoint": collector.config.endpoint}
        with (
            rollout_process(tmp_path, engine={"seconds_per_step": 0.01}, tracing=own) as server,
            RolloutPool([server.grpc], job="traced", deadline_s=20) as pool,
            WeightSender([server.grpc], bucket_bytes=2**20, job="traced", deadline_s=20) as sender,
        ):
            with tracing("trainer", collector.config), span("step", step=3):
                with span("publish"):
                    sender.publish(1, FINGERPRINT, weights(1)[0])
                pool.submit(prompt(), Sampling(max_new_tokens=6), num_samples=3, seed=0, min_weight_version=1).wait()
            pool.submit(prompt(), Sampling(max_new_tokens=6), num_samples=1, seed=0).wait()  # traced nowhere
            server.signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
        spans = collector.all()
    step, publish, sent, samples = (spans["kdmesh-trainer", name] for name in ("step", "publish", "weights", "samples"))
    update, receive, commit, request, queue, decode = (
        spans["kdmesh-rollout", name]
        for name in ("weight update", "receive", "commit", "generate request", "queue", "decode")
    )
    assert len(spans) == 10
    assert {one.trace_id for one in spans.values()} == {step.trace_id}
    assert {sent.parent_span_id, update.parent_span_id} == {publish.span_id}
    assert {receive.parent_span_id, commit.parent_span_id} == {update.span_id}
    assert (samples.parent_span_id, request.parent_span_id) == (step.span_id, samples.span_id)
    assert {queue.parent_span_id, decode.parent_span_id} == {request.span_id}
    assert receive.end_time_unix_nano <= commit.start_time_unix_nano <= update.end_time_unix_nano
    assert queue.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano - decode.start_time_unix_nano >= 6 * 0.01e9
    facts = {each.key: each.value for one in (sent, update, request, decode) for each in one.attributes}
    assert facts["address"].string_value == server.grpc
    assert facts["door"].string_value == "shm"
    assert facts["is_taken"].bool_value
    assert facts["version"].int_value == 1
    assert facts["job"].string_value == "traced"
    assert facts["samples"].int_value == 3
    assert facts["tokens"].int_value == 18


def test_steps_that_are_not_sampled_are_not_traced_anywhere() -> None:
    with collecting() as collector:
        rarely = collector.config.model_copy(update={"sampled_fraction": 1e-9})
        with tracing("trainer", rarely), span("step", step=1):
            assert int(current()[-2:], 16) & 1 == 0  # what servers are told: do not trace
        assert collector.all() == {}


def test_a_collector_that_does_not_answer_keeps_nobody_for_every_batch_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans, "_SEND_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        with tracing("trainer", TracingConfig(endpoint=url)):
            for step in range(2000):  # in four batches
                with span("step", step=step):
                    pass
        asked = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                asked += 1
        assert 1 <= asked < 4


def test_without_a_collector_there_are_no_spans_and_no_fields_in_the_log() -> None:
    with tracing("trainer", None), span("step", step=1):
        assert current() == ""
        assert "trace_id" not in line()


def test_lines_of_the_log_name_the_span_around() -> None:
    with collecting() as collector, tracing("trainer", collector.config), span("step", step=1):
        _, trace_id, span_id, _ = current().split("-")
        assert (line()["trace_id"], line()["span_id"]) == (trace_id, span_id)


def line() -> dict[str, str]:
    """A line of the log, written now."""
    written: dict[str, str] = json.loads(log.JsonFormatter("any", 0).format(logging.makeLogRecord({"msg": "event"})))
    return written


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    wanted = TracingConfig(endpoint="http://127.0.0.1:1/v1/traces")
    with pytest.raises(ConfigError, match=r"pip install 'kdmesh\[tracing\]'"), tracing("trainer", wanted):
        pass
