"""Traces: what a step asks for is followed into the teacher's process, and nothing is sent unless somebody wants it."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from kdmesh import log
from kdmesh.errors import ConfigError
from kdmesh.rpc.teacher_pool import TeacherPool
from kdmesh.tracing.config import TracingConfig
from kdmesh.tracing.spans import current, span, tracing
from tests.support.teacher_process import teacher_process
from tests.support.teacher_requests import sequence


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self, port: int) -> None:
        self.config = TracingConfig(endpoint=f"http://127.0.0.1:{port}/v1/traces")
        self._spans: list[tuple[str, Span]] = []

    def take(self, body: bytes) -> None:
        """Remember what came."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            found = (one for scope in resource.scope_spans for one in scope.spans)
            self._spans += [(names["service.name"], one) for one in found]

    def all(self) -> dict[tuple[str, str], Span]:
        """By service and name; the last of each."""
        return {(service, one.name): one for service, one in self._spans}


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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


def test_steps_that_are_not_sampled_are_not_traced_anywhere() -> None:
    with collecting() as collector:
        rarely = collector.config.model_copy(update={"sampled_fraction": 1e-9})
        with tracing("trainer", rarely), span("step", step=1):
            assert int(current()[-2:], 16) & 1 == 0  # what servers are told: do not trace
        assert collector.all() == {}


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
