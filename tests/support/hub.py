"""A stand-in for Hugging Face's hub, which its own client talks to over HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, urlsplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """What the hub has under one name."""

    name: str
    commit: str  # that `branch` is
    files: Mapping[str, bytes]
    branch: str = "main"
    is_dataset: bool = False
    listed: Sequence[str] = ()  # files that it speaks of, where those are others
    token: str | None = None  # that readers must have
    is_gated: bool = False  # and nobody has agreed to its terms

    @property
    def names(self) -> Sequence[str]:
        """Of the files that it speaks of."""
        return self.listed or tuple(self.files)

    def answer(self, path: str, token: str | None) -> tuple[int, bytes, str] | None:
        """Status, body and error code for a path of the hub's; None: it is not about this repository."""
        prefix = "datasets/" if self.is_dataset else ""
        api, files = f"/api/{prefix or 'models/'}{self.name}/", f"/{prefix}{self.name}/resolve/{self.commit}/"
        if not path.startswith((api, files)):
            return None
        if self.token is not None and token != f"Bearer {self.token}":
            return 401, b"", "RepoNotFound"
        if self.is_gated:
            return 403, b"", "GatedRepo"
        if path in (f"{api}revision/{quote(self.branch, safe='')}", f"{api}revision/{self.commit}"):
            siblings = [{"rfilename": name} for name in self.names]
            return 200, json.dumps({"id": self.name, "sha": self.commit, "siblings": siblings}).encode(), ""
        if path == f"{api}tree/{self.commit}":
            sizes = ((name, len(self.files.get(name, b""))) for name in self.names)
            tree = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes]
            return 200, json.dumps(tree).encode(), ""
        if path.startswith(api):
            return 404, b"", "RevisionNotFound"
        body = self.files.get(path.removeprefix(files))
        return (404, b"", "EntryNotFound") if body is None else (200, body, "")


@contextmanager
def hub(*repositories: Repository) -> Iterator[tuple[str, list[str]]]:
    """Its address, for `HF_ENDPOINT`, and the paths that it was asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            asked.append(path)
            answers = ((each, each.answer(path, self.headers["Authorization"])) for each in repositories)
            found = next(((each, answer) for each, answer in answers if answer is not None), None)
            if found is None:
                self._say(401, b"", "RepoNotFound", "0" * 40)  # as the hub says to who may not know whether it is there
            else:
                self._say(*found[1], found[0].commit)

        do_HEAD = do_GET

        def _say(self, status: int, body: bytes, code: str, commit: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()
