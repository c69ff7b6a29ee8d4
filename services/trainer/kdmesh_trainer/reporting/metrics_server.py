"""Shows a run's numbers to Prometheus."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from kdmesh_trainer.sections.metrics_config import MetricsConfig

log = logging.getLogger(__name__)

_LONGEST_S = 10.0  # a client that takes longer is let go: the end of the run waits for it


class MetricsServer:
    """Answers in threads of its own.

    Attributes:
        port: where.
    """

    def __init__(self, port: int, was_read: threading.Event, linger_s: float) -> None:
        self.port = port
        self._was_read = was_read
        self._linger_s = linger_s

    def await_reading(self) -> None:
        """Return when somebody has read the numbers as they are now, or after `linger_s`."""
        self._was_read.clear()
        if self._linger_s and not self._was_read.wait(self._linger_s):
            log.warning("nobody read the metrics at the end", extra={"linger_s": self._linger_s})


@contextmanager
def serving(cfg: MetricsConfig, registry: CollectorRegistry) -> Iterator[MetricsServer]:
    """While the context lasts. Raises ConfigError when the port is in use, or the address is not this machine's."""
    metrics_app = make_wsgi_app(registry)
    was_read = threading.Event()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        was_read.set()  # first: then what is read is newer than any `clear` before
        # The text that servers have, for everybody: prometheus_client fails on an Accept whose version is no number.
        environ.pop("HTTP_ACCEPT", None)
        answer: Iterable[bytes] = metrics_app(environ, start_response)
        return answer

    try:
        server = make_server(cfg.host, cfg.port, app, server_class=_Server, handler_class=_Handler)
    except OSError as error:
        raise cfg.refusal(error) from None
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    log.info("metrics are shown", extra={"host": cfg.host, "port": server.server_port})
    try:
        yield MetricsServer(server.server_port, was_read, cfg.linger_s)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()  # waits for answers that are on their way


class _Server(ThreadingMixIn, WSGIServer):
    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is none of ours."""
        log.debug("a reader of the metrics was let go", exc_info=True)


class _Handler(WSGIRequestHandler):
    def setup(self) -> None:
        """See socketserver."""
        super().setup()
        self._longest = threading.Timer(_LONGEST_S, self._let_go)
        self._longest.daemon = True
        self._longest.start()

    def finish(self) -> None:
        """See socketserver."""
        self._longest.cancel()
        super().finish()

    def _let_go(self) -> None:
        with suppress(OSError):  # it has gone
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """A reading is no event."""
