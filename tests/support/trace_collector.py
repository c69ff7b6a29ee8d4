"""An OpenTelemetry collector that keeps what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from kdmesh.tracing.config import TracingConfig


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

    def every(self, service: str, name: str) -> list[Span]:
        """Spans of this name."""
        return [one for found, one in self._spans if (found, one.name) == (service, name)]


@contextmanager
def collecting() -> Iterator[Collector]:
    """One that listens while the context lasts."""

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
