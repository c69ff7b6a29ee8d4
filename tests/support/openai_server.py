"""A server with OpenAI's chat completions, whose answers follow from what is asked, and whose faults are told it."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from tests.support.certificates import Pair

Fault = Literal["reset", "hang", "garbage"]

MODEL = "teacher"
KEY = "sk-test"


@dataclass
class Answer:
    """What is answered instead of a completion."""

    status: int = 200
    body: object = None
    headers: Mapping[str, str] = field(default_factory=dict)


class OpenAIServer:
    """What it was asked, and what it does next."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.asked: list[dict[str, Any]] = []  # bodies, in the order in which they came
        self.keys: set[str] = set()  # of Authorization
        self.next: deque[Answer | Fault] = deque()  # for the requests that come next; then completions
        self.choices: dict[str, list[dict[str, Any]]] = {}  # instead of its own, by the last message's text
        self.refused: dict[str, Answer] = {}  # likewise
        self.takes_n = True  # False: n is not known, and one choice is answered
        self.wants_key = False
        self.together: threading.Barrier | None = None  # completions that must be under way before any is answered
        self.most = 0  # completions under way at once
        self.open = threading.Event()
        self._running = 0
        self._lock = threading.Lock()

    def times_asked(self) -> Counter[str]:
        """How often, by the last message's text."""
        return Counter(last_text(body) for body in self.asked)

    def answer(self, path: str, key: str, body: dict[str, Any]) -> Answer | Fault:
        """The next fault, or a completion."""
        with self._lock:
            self.asked.append(body)
            self.keys.add(key)
            fault = self.next.popleft() if self.next else None
            self._running += 1
            self.most = max(self.most, self._running)
        try:
            if fault is not None:
                return fault
            if path != "/v1/chat/completions":
                return Answer(404, {"detail": "Not Found"})
            if self.wants_key and key != f"Bearer {KEY}":
                return Answer(401, {"error": {"message": f"Incorrect API key provided: {key}.", "code": "invalid"}})
            if body["model"] != MODEL:
                return Answer(404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}})
            if last_text(body) in self.refused:
                return self.refused[last_text(body)]
            if self.together is not None:
                self.together.wait(60)
            return self._completion(body)
        finally:
            with self._lock:
                self._running -= 1

    def _completion(self, body: dict[str, Any]) -> Answer:
        number = body.get("n", 1) if self.takes_n else 1
        choices = self.choices.get(last_text(body))
        if choices is None:
            choices = [said(answer_of(body, i)) for i in range(number)]
        return Answer(
            body={
                "object": "chat.completion",
                "choices": [{"index": i, **choice} for i, choice in enumerate(choices)],
                "usage": {"prompt_tokens": 10, "completion_tokens": 3 * len(choices)},
            }
        )


def said(text: str | None, *, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A choice."""
    return {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}


def answer_of(body: Mapping[str, Any], sample: int) -> str:
    """What sample number `sample` of a request says: of one seed, n samples are those of the seeds that follow it."""
    words = json.dumps([body["messages"], (body.get("seed") or 0) + sample])
    return f"{last_text(body)}? {hashlib.blake2b(words.encode(), digest_size=4).hexdigest()}"


def last_text(body: Mapping[str, Any]) -> str:
    """Of the last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")


class _Listening(ThreadingHTTPServer):
    served: OpenAIServer
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


class _Handler(BaseHTTPRequestHandler):
    server: _Listening

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.served.answer(self.path, self.headers.get("Authorization", ""), body)
        match answer:
            case Answer():
                self._send(answer)
            case "garbage":
                self._send(Answer(body="<html>a proxy</html>"))
            case "hang":
                self.server.served.open.wait()
            case "reset":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.wfile.flush()
                # With nobody to linger for what was not sent, the connection is reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True

    def _send(self, answer: Answer) -> None:
        data = answer.body.encode() if isinstance(answer.body, str) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def openai_server(*, certificate: Pair | None = None) -> Iterator[OpenAIServer]:
    """One that listens while the context lasts; over TLS where it has a certificate."""
    listening = _Listening(("127.0.0.1", 0), _Handler)
    listening.served = server = OpenAIServer(listening.server_port)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.cert, certificate.key)
        # Each connection shakes hands in its own thread: one whose client went away must not hold up the others.
        listening.socket = context.wrap_socket(listening.socket, server_side=True, do_handshake_on_connect=False)
        server.url = server.url.replace("http", "https", 1)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.open.set()
        listening.shutdown()
        thread.join()
        listening.server_close()
