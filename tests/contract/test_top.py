"""`kdmesh top`: one table, one JSON object, or live in a terminal that is clean afterwards."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kdmesh.commands import cli
from kdmesh.rpc.retry import Deadline
from tests.support.certificates import CertificateAuthority
from tests.support.identities import VIEWER, write_tokens
from tests.support.teacher_requests import sequence
from tests.support.teacher_server import RunningTeacher, running_teacher


async def top(address: str, *options: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, cli.main, ["top", "--server", address, *options])


async def some_work(teacher: RunningTeacher, job: str) -> None:
    async with teacher.client(job=job) as client:
        await client.prefill([sequence(9)], Deadline.after(10))


async def test_once_prints_a_table_of_the_jobs(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, jobs={"overrides": {"[red]job": {"weight": 2.5}}}) as teacher:
        await some_work(teacher, "[red]job")
        shown = await top(teacher.addresses.rest, "--once")
    assert shown.exit_code == 0
    assert "kdmesh teacher  ready" in shown.output
    row = next(line for line in shown.output.splitlines() if line.startswith("[red]job"))
    assert "normal" in row
    assert "2.5" in row
    assert "100%" in row


async def test_json_is_one_object_with_what_the_server_said(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        await some_work(teacher, "job")
        shown = await top(teacher.addresses.rest, "--json")
    status = json.loads(shown.output)
    assert (status["service"], status["state"]) == ("teacher", "ready")
    assert status["working"]["jobs"][0]["tokens"] == 9
    assert sum(status["working"]["slab"]["slots"].values()) == 4


async def test_server_that_loads_is_shown_without_jobs(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, wait_ready=False, held=True) as teacher:
        shown = await top(teacher.addresses.rest)  # no terminal: one table
    assert "the server is loading the model" in shown.output


async def test_nobody_at_the_address_is_an_error(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        address = teacher.addresses.rest
    shown = await top(address, "--once")
    assert shown.exit_code == 2
    assert f"{address} does not answer: Connection refused" in shown.output


async def test_an_address_without_a_port_is_refused() -> None:
    shown = await top("localhost", "--once")
    assert shown.exit_code == 2
    assert "'localhost' is not of the form host:port" in shown.output


@contextmanager
def answering(status: Mapping[str, Any]) -> Iterator[str]:
    """The address of a server that says this of itself."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(status).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def test_the_port_of_grpc_is_told_from_that_of_rest(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        result = await top(teacher.addresses.grpc, "--once")
    assert result.exit_code == 2
    assert "answers, but not HTTP: is it `server.port` instead of `server.rest_port`?" in result.output


async def test_a_newer_server_may_say_more_and_an_older_one_not_less(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        await some_work(teacher, "job")
        told = json.loads((await top(teacher.addresses.rest, "--json")).output)
    for part in (told, told["working"], told["working"]["slab"], told["working"]["jobs"][0]):
        part["news"] = 1
    with answering(told) as address:
        shown = await top(address, "--once")
    assert shown.exit_code == 0
    assert any(line.startswith("job") and "100%" in line for line in shown.output.splitlines())
    del told["working"]["jobs"][0]["tokens"]
    with answering(told) as address:
        shown = await top(address, "--once")
    assert shown.exit_code == 2
    assert "answers something else than this kdmesh understands: 'tokens'" in shown.output


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        self.seen = b""
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(self.master, self._read)

    def _read(self) -> None:
        self.seen += os.read(self.master, 65536)
        self._changed.set()

    async def until(self, shown: Callable[[bytes], bool]) -> None:
        try:
            async with asyncio.timeout(60):
                while not shown(self.seen):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not within a minute; seen: {self.seen[-2000:]!r}") from None

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.master)
        os.close(self.master)
        os.close(self.slave)


def _without_size(env: Mapping[str, str]) -> dict[str, str]:
    """Those of the test's own terminal would count more than the size of the command's."""
    return {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES")}


async def test_live_view_survives_its_server_and_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    terminal = Terminal()
    before = termios.tcgetattr(terminal.slave)
    async with running_teacher(tmp_path) as teacher:
        await some_work(teacher, "some-job")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", "from kdmesh.commands.cli import main; main()", "top"),
            *("--server", teacher.addresses.rest, "--interval", "0.1"),
            stdin=terminal.slave,
            stdout=terminal.slave,
            stderr=terminal.slave,
            env=_without_size(os.environ) | {"TERM": "xterm"},
        )
        await terminal.until(lambda seen: b"some-job" in seen)
        assert termios.tcgetattr(terminal.slave) != before
    await terminal.until(lambda seen: b"does not answer" in seen)
    assert b"\x1b[?1049l" not in terminal.seen
    os.write(terminal.master, b"q")
    assert await process.wait() == 0
    await terminal.until(lambda seen: seen.endswith(b"\x1b[?25h\x1b[?1049l"))
    assert termios.tcgetattr(terminal.slave) == before
    terminal.close()


async def test_a_live_view_that_is_ended_by_a_signal_leaves_the_terminal_as_it_was() -> None:
    terminal = Terminal()
    before = termios.tcgetattr(terminal.slave)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", "from kdmesh.commands.cli import main; main()", "top", "--server", "127.0.0.1:1"),
        stdin=terminal.slave,
        stdout=terminal.slave,
        env=_without_size(os.environ) | {"TERM": "xterm"},
    )
    await terminal.until(lambda seen: b"q quits" in seen)
    process.terminate()
    assert await process.wait() == 0
    await terminal.until(lambda seen: seen.endswith(b"\x1b[?25h\x1b[?1049l"))
    assert termios.tcgetattr(terminal.slave) == before
    terminal.close()


async def test_server_that_asks_who_calls_is_shown_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there: the token is for the server alone
    auth = {"tokens": str(write_tokens(tmp_path / "tokens.yaml", VIEWER))}
    (tmp_path / "token").write_text(VIEWER, encoding="utf-8")
    (tmp_path / "access.yaml").write_text(f"token_file: {tmp_path / 'token'}\n", encoding="utf-8")
    async with running_teacher(tmp_path, server={"auth": auth}) as teacher:
        shown = await top(teacher.addresses.rest, "--once", "--access", str(tmp_path / "access.yaml"))
        refused = await top(teacher.addresses.rest, "--once")
    assert "kdmesh teacher  ready" in shown.output
    assert refused.exit_code == 2
    assert "answers 401" in refused.output
    assert VIEWER not in refused.output


@pytest.mark.parametrize(("name", "words"), [("teacher.ml.svc", "kdmesh teacher  ready"), ("other.ml.svc", "mismatch")])
async def test_a_server_behind_another_address_is_known_by_the_name_in_its_certificate(
    tmp_path: Path, name: str, words: str
) -> None:
    authority = CertificateAuthority(tmp_path)
    pair = authority.issue("server", ["teacher.ml.svc"])
    access = {"tls": {"ca": str(authority.cert), "server_name": name}}
    (tmp_path / "access.yaml").write_text(json.dumps(access), encoding="utf-8")
    tls = {"cert": str(pair.cert), "key": str(pair.key)}
    async with running_teacher(tmp_path, server={"tls": tls}) as teacher:
        shown = await top(teacher.addresses.rest, "--once", "--access", str(tmp_path / "access.yaml"))
    assert words in shown.output
