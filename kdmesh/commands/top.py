"""What a server does for whom, live in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import select
import sys
import termios
import tty
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kdmesh.auth.config import AccessConfig
from kdmesh.auth.tls_context import client_context
from kdmesh.auth.tokens import read_token
from kdmesh.commands.stopping import stoppable
from kdmesh.errors import ConfigError, KdmeshError
from kdmesh.outputs import say, show
from kdmesh.serving.http.status import SlabStatus, Status, Working
from kdmesh.serving.jobs.state import JobState
from kdmesh.serving.words import count, seconds, size

T = TypeVar("T")

_ANSWER_S = 5.0
_WIDTH = 160  # of what is no terminal
_COLUMNS = (
    "job",
    "class",
    "weight",
    "tokens/s",
    "share",
    "waiting",
    "p50",
    "p99",
    "in flight",
    "slots",
    "sessions",
    "refused",
)


class NoAnswer(KdmeshError):
    """The server does not answer, or not as it should."""


class Server:
    """The REST port of a server, asked for its status.

    Raises:
        ConfigError: a file of `access` cannot be used, or its token would travel in the clear.
    """

    def __init__(self, address: str, access: AccessConfig) -> None:
        if (refusal := access.refusal(address)) is not None:
            raise ConfigError(refusal)
        self.address = address
        self._access = access
        self._context = None if access.tls is None else client_context(access.tls)
        # A proxy from the environment never leads to a server, and must not see the token.
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self._context)
        )

    def look(self) -> Status:
        """Blocks. Raises NoAnswer."""
        scheme = "http" if self._context is None else "https"
        request = urllib.request.Request(f"{scheme}://{self.address}/v1/status")
        if self._access.token_file is not None:
            request.add_header("Authorization", f"Bearer {read_token(self._access.token_file)}")
        try:
            with self._opener.open(request, timeout=_ANSWER_S) as answer:
                return _status(json.load(answer))
        except urllib.error.HTTPError as error:
            raise NoAnswer(f"{self.address} answers {error.code}: {_reason(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            # It quotes gRPC's first bytes; one that is of a kind of its own is a lost connection.
            if type(error) is http.client.BadStatusLine:
                raise NoAnswer(
                    f"{self.address} answers, but not HTTP: is it `server.port` instead of `server.rest_port`?"
                ) from None
            reason = getattr(error, "reason", error)
            said = getattr(reason, "strerror", None) or reason
            raise NoAnswer(f"{self.address} does not answer: {said}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise NoAnswer(f"{self.address} answers something else than this kdmesh understands: {error}") from None


def once(server: Server, *, as_json: bool) -> None:
    """Print what the server does now. Raises NoAnswer."""
    status = server.look()
    if as_json:
        say(json.dumps(dataclasses.asdict(status)) + "\n")
    else:
        show(render(status), width=_WIDTH)


def live(server: Server, *, interval_s: float) -> None:
    """Show what the server does until q, Ctrl-C or SIGTERM. When it goes away, that is said, and it is asked again."""
    status: Status | None = None
    problem = ""
    with contextlib.suppress(KeyboardInterrupt), stoppable(), _keys(), Live(screen=True, auto_refresh=False) as screen:
        while True:
            try:
                status, problem = server.look(), ""
            except NoAnswer as error:
                problem = str(error)
            screen.update(_screen(status, problem), refresh=True)
            if _is_quit(interval_s):
                return


def render(status: Status) -> Group:
    """A few lines of the server, and a table of its jobs."""
    head = Text.assemble(
        (f"kdmesh {status.service}", "bold"), "  ", (status.state, "green" if status.state == "ready" else "bold red")
    )
    working = status.working
    if working is None:
        return Group(head)
    speed = working.engine_tokens_per_s
    lines = [
        f"{working.model}, weights {working.weight_version}",
        f"throughput  {count(working.tokens_per_s)} tokens/s lately; the engine does "
        + ("as yet nothing" if speed is None else f"{count(speed)} while it computes"),
        f"queue       {count(working.waiting_tokens)} tokens in {working.waiting_requests} requests",
    ]
    if working.slab is not None:
        states = ", ".join(f"{number} {state}" for state, number in working.slab.slots.items() if number)
        lines.append(f"slab        {states}; slots of {size(working.slab.slot_bytes)}, {working.slab.orphans} orphans")
    return Group(head, *map(Text, lines), Text(), _table(working))


def _table(working: Working) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "job" else "right", no_wrap=name != "refused")
    for state in sorted(working.jobs, key=lambda state: -state.share):
        refused = ", ".join(f"{number} {reason}" for reason, number in state.refusals.items())
        cells = (
            state.job or "(unnamed)",
            str(state.terms["priority"]),
            f"{state.terms['weight']:g}",
            count(state.tokens_per_s),
            f"{state.share:.0%}",
            count(state.waiting_tokens),
            seconds(state.wait_p50_s),
            seconds(state.wait_p99_s),
            count(state.tokens_in_flight),
            str(state.slots),
            str(state.sessions),
            refused or "0",
        )
        table.add_row(*map(Text, cells))  # Text: names come from clients, and may look like markup
    return table


def _screen(status: Status | None, problem: str) -> Group:
    parts: list[Any] = [] if status is None else [render(status)]
    if problem:
        parts += [Text(), Text(f"{problem}; trying again", style="bold red")]
    return Group(*parts, Text(), Text("q quits", style="dim"))


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Single keys can be read inside, without a line's end, and the terminal is as before after."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _is_quit(wait_s: float) -> bool:
    """Wait; True when q came, or nobody can press a key any more."""
    ready, _, _ = select.select([sys.stdin], [], [], wait_s)
    return bool(ready) and sys.stdin.read(1) in ("q", "Q", "")


def _reason(error: urllib.error.HTTPError) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.load(error)["reason"])
    return error.reason


def _status(tree: dict[str, Any]) -> Status:
    working = tree["working"]
    if working is None:
        return Status(service=tree["service"], state=tree["state"], working=None)
    slab = working["slab"]
    understood = working | {
        "slab": None if slab is None else _known(SlabStatus, slab),
        "jobs": tuple(_known(JobState, job) for job in working["jobs"]),
    }
    return Status(service=tree["service"], state=tree["state"], working=_known(Working, understood))


def _known(kind: type[T], tree: dict[str, Any]) -> T:
    """What is understood of it: a newer server may say more."""
    return kind(**{field.name: tree[field.name] for field in dataclasses.fields(cast(Any, kind))})
