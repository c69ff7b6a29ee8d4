"""Spans of what is done here; nothing at all unless `tracing` says where they go."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kdmesh.errors import ConfigError
from kdmesh.tracing.config import TracingConfig

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

Attribute = str | int | float | bool

_SEND_S = 5.0  # a collector that does not answer keeps nobody longer
_tracer: Tracer | None = None


@contextlib.contextmanager
def tracing(service: str, cfg: TracingConfig | None, *, rank: int = 0) -> Iterator[None]:
    """Send this process's spans while the context lasts; on exit what is left. One at a time.

    Args:
        service: the name that they carry.
        cfg: None traces nothing.
        rank: of the process in its job.

    Raises:
        ConfigError: the libraries are not installed.
    """
    global _tracer
    if cfg is None:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise ConfigError(
            f"tracing: {error.name} is missing: install it with `pip install 'kdmesh[tracing]'`"
        ) from None
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"kdmesh-{service}", "service.instance.id": str(rank)}),
        sampler=ParentBasedTraceIdRatio(cfg.sampled_fraction),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=cfg.endpoint, timeout=_SEND_S)))
    _tracer = provider.get_tracer("kdmesh")
    try:
        yield
    finally:
        _tracer = None
        # In a thread, since it tries to send every batch that is left, however long each one takes.
        ending = threading.Thread(target=provider.shutdown, name="send what is left", daemon=True)
        ending.start()
        ending.join(_SEND_S)


@contextlib.contextmanager
def span(name: str, *, parent: str | None = None, **attributes: Attribute) -> Iterator[None]:
    """A span around what happens inside; an exception marks it as failed.

    Args:
        name: what is done.
        parent: `current()` of another process, which may be empty; then nothing is traced. None takes the span around.
    """
    if _tracer is None or parent == "":
        yield
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = None if parent is None else TraceContextTextMapPropagator().extract({"traceparent": parent})
    with _tracer.start_as_current_span(name, context=context, attributes=attributes):
        yield


def record(name: str, *, begin_s: float, end_s: float, **attributes: Attribute) -> None:
    """A part of the span around that has ended already; times are of `time.time`."""
    if _tracer is None or not current():
        return
    done = _tracer.start_span(name, start_time=int(begin_s * 1e9), attributes=attributes)
    done.end(int(end_s * 1e9))


def current() -> str:
    """The span around, as W3C's `traceparent`; empty where there is none."""
    if _tracer is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def log_fields() -> Mapping[str, str]:
    """What a line of the log says of the span around."""
    parts = current().split("-")
    return {"trace_id": parts[1], "span_id": parts[2]} if len(parts) == 4 else {}
