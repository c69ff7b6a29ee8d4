"""Which of several servers that do the same gets a request, when many clients decide without asking each other."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdmesh.types import ServerLoad

_ABOUT_EQUAL = 1.25  # speeds that differ by less are taken for the same: they were measured on different batches
_NEWEST = 0.2  # weight of the newest answer in a mean


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPolicy:
    """How a request finds a server."""

    choices: int = 3
    """Servers, drawn at random, whose loads are compared for one request. Few, so that clients that decide at the
    same moment do not all find the same one."""

    local_tokens: int = 8192
    """Tokens more that a server on this node may have before one elsewhere is taken."""

    fresh_s: float = 0.02
    """How long a report of a load is relied on without asking again."""

    slow_start_s: float = 30.0
    """A server that has just come is drawn more and more often for so long, instead of getting everything at once; 0:
    as often as any other at once."""

    max_failures: int = 3
    """As many failures in a row make a server sick."""

    slow_factor: float = 5.0
    """So many times as long as its load and its speed explain, `slow_by_s` added, and as the others do by the same
    measure, a server's answers may take. Infinity: time says nothing."""

    slow_by_s: float = 1.0
    """What is always explained."""

    min_answers: int = 5
    """Of fewer nothing is concluded."""

    ejected_s: float = 5.0
    """A sick server gets nothing for so long, twice as long each further time."""

    longest_ejected_s: float = 60.0
    """But never longer than this."""

    hedge_after_s: float | None = None
    """Ask a second server too when the first has not answered for so long. None: one at a time."""

    look_every_s: float = 5.0
    """How often names are looked up again."""


DEFAULT_ROUTING = RoutingPolicy()


class Router:
    """Knows the servers that are connected, and nothing else: no clock, no socket. Times are of any one clock.

    Of a few servers, drawn at random, a request goes to the one that gets to its end first: by the tokens that the
    server says wait there, of every client, and its measured speed. A sick server is ejected, never more than half of
    all; after its time it is tried with one request, and starts slowly when that is answered.

    Args:
        rng: what draws; each client needs one of its own.
    """

    def __init__(self, policy: RoutingPolicy, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self._servers: dict[str, _Server] = {}

    # Who is there

    def join(self, name: str, now_s: float, *, is_local: bool) -> None:
        """A server is connected."""
        self._servers[name] = _Server(is_local=is_local, since_s=now_s)

    def leave(self, name: str) -> None:
        """It is not any more. What was sent to it may still be answered or fail."""
        self._servers.pop(name, None)

    # Deciding

    def barred_s(self, name: str, now_s: float) -> float:
        """How long a server gets nothing because it is sick; infinite while its trial is under way."""
        server = self._servers[name]
        if not server.is_ejected or all(other.is_ejected for other in self._servers.values()):
            return 0.0
        if now_s < server.ejected_until_s:
            return server.ejected_until_s - now_s
        return math.inf if server.outstanding_requests else 0.0

    def draw(self, names: Sequence[str], now_s: float) -> list[str]:
        """The few of `names` that are compared for one request: those on this node, and others at random.

        None of them is barred; at least one is returned for one that is given.
        """
        oldest = max(self._ramp(self._servers[name], now_s) for name in names)
        in_any_order = self._rng.sample(names, len(names))
        drawn: list[str] = []
        for name in sorted(in_any_order, key=lambda name: not self._servers[name].is_local):
            server = self._servers[name]
            if len(drawn) >= self._policy.choices and not server.is_local:
                break
            if self._rng.random() * oldest < self._ramp(server, now_s):  # always, for the oldest
                drawn.append(name)
        return drawn

    def is_on_trial(self, name: str) -> bool:
        """Whether it was sick, and nothing says yet that it is well."""
        return self._servers[name].is_ejected

    def is_known(self, name: str, now_s: float) -> bool:
        """Whether its load was reported a moment ago, so that it need not be asked."""
        return now_s - self._servers[name].reported_s <= self._policy.fresh_s

    def best(self, names: Iterable[str], num_tokens: int, now_s: float) -> str:
        """The one of those drawn that should answer a request of so many tokens first; of equals, the one that did
        least lately."""
        servers = {name: self._servers[name] for name in names}
        speeds = [s.load.tokens_per_s for s in servers.values() if s.load is not None and s.load.tokens_per_s]
        typical = sum(speeds) / len(speeds) if speeds else 1.0

        def cost(name: str) -> tuple[float, float, float]:
            server = servers[name]
            tokens = (server.backlog(now_s) + num_tokens) / server.relative_speed(typical)
            recent = server.load.recent_tokens if server.load is not None else 0.0
            return tokens - self._policy.local_tokens * server.is_local, recent, self._rng.random()

        return min(servers, key=cost)

    # What happens

    def sent(self, name: str, num_tokens: int, now_s: float) -> SentRequest:
        """A request goes to it; what comes of it is told with what this returns."""
        server = self._servers[name]
        explained_s = server.seconds_for(num_tokens, now_s)
        server.outstanding_requests += 1
        server.outstanding_tokens += num_tokens
        server.unreported_tokens += num_tokens
        return SentRequest(name=name, server=server, num_tokens=num_tokens, at_s=now_s, explained_s=explained_s)

    def answered(self, request: SentRequest, now_s: float) -> None:
        """A request was answered."""
        server = request.end()
        server.failures = 0
        if server.is_ejected:
            if request.at_s >= server.ejected_until_s:  # else it was sent before
                server.come_back(now_s)
            return
        if self._ramp(server, now_s) == 1.0:
            server.ejections = 0
        server.answers += 1
        lateness = (now_s - request.at_s) / (request.explained_s + self._policy.slow_by_s)
        server.lateness += max(_NEWEST, 1 / server.answers) * (lateness - server.lateness)
        if self._is_slow(server):
            self._eject(server, now_s)

    def unanswered(self, request: SentRequest, now_s: float, *, is_its_fault: bool) -> None:
        """A request has ended without an answer: given up, refused for now, or failed by the server's fault."""
        request.end()
        if is_its_fault:
            self.failed(request.name, now_s)

    def failed(self, name: str, now_s: float) -> None:
        """It did something wrong, or did not say its load when it was asked."""
        server = self._servers.get(name)
        if server is None or (server.is_ejected and now_s < server.ejected_until_s):
            return
        server.failures += 1
        if server.is_ejected or server.failures >= self._policy.max_failures:
            self._eject(server, now_s)

    def reported(self, name: str, load: ServerLoad, now_s: float) -> None:
        """It has said its load, as it is now."""
        server = self._servers.get(name)
        if server is not None:
            server.load, server.reported_s, server.unreported_tokens = load, now_s, 0

    def _ramp(self, server: _Server, now_s: float) -> float:
        """From a tenth to 1."""
        if server.is_ejected or not self._policy.slow_start_s:
            return 1.0  # an ejected one gets its trial soon
        return min(1.0, 0.1 + 0.9 * (now_s - server.since_s) / self._policy.slow_start_s)

    def _is_slow(self, server: _Server) -> bool:
        enough = self._policy.min_answers
        others = sorted(
            s.lateness for s in self._servers.values() if s is not server and not s.is_ejected and s.answers >= enough
        )
        if server.answers < enough or not others:
            return False
        return server.lateness > self._policy.slow_factor * max(others[len(others) // 2], 1.0)

    def _eject(self, server: _Server, now_s: float) -> None:
        num_ejected = sum(s.is_ejected for s in self._servers.values())
        if not server.is_ejected and 2 * (num_ejected + 1) > len(self._servers):
            return
        wait_s = self._policy.ejected_s * 2.0 ** min(server.ejections, 16)
        server.is_ejected = True
        server.ejections += 1
        server.ejected_until_s = now_s + min(wait_s, self._policy.longest_ejected_s)


@dataclass(slots=True, kw_only=True)
class _Server:
    """What is known of one."""

    is_local: bool
    since_s: float  # when it came, or came back
    outstanding_requests: int = 0  # of this client
    outstanding_tokens: int = 0
    load: ServerLoad | None = None
    reported_s: float = -math.inf
    unreported_tokens: int = 0  # that this client sent since the report
    failures: int = 0  # in a row
    answers: int = 0
    lateness: float = 0.0  # mean of the last answers: how long they took, over how long they should
    is_ejected: bool = False
    ejections: int = 0  # since it was last well for a while
    ejected_until_s: float = 0.0

    def backlog(self, now_s: float) -> float:
        """Tokens that wait there now, as far as can be known."""
        if self.load is None:
            return self.outstanding_tokens
        done = (self.load.tokens_per_s or 0.0) * (now_s - self.reported_s)
        return max(self.outstanding_tokens, self.load.waiting_tokens - done + self.unreported_tokens)

    def seconds_for(self, num_tokens: int, now_s: float) -> float:
        """How long a request should take that comes now; 0 where no speed is known."""
        if self.load is None or not self.load.tokens_per_s:
            return 0.0
        return (self.backlog(now_s) + num_tokens) / self.load.tokens_per_s

    def relative_speed(self, typical: float) -> float:
        """1 for a usual one, and for one that has not said."""
        if self.load is None or not self.load.tokens_per_s:
            return 1.0
        ratio = self.load.tokens_per_s / typical
        return 1.0 if 1 / _ABOUT_EQUAL < ratio < _ABOUT_EQUAL else ratio

    def come_back(self, now_s: float) -> None:
        """Its trial went well."""
        self.is_ejected = False
        self.since_s = now_s
        self.answers = 0
        self.lateness = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class SentRequest:
    """One that a server was given, and has not ended."""

    name: str
    server: _Server
    num_tokens: int
    at_s: float
    explained_s: float  # how long it should take

    def end(self) -> _Server:
        """Count it out, of a server that may have left meanwhile."""
        self.server.outstanding_requests -= 1
        self.server.outstanding_tokens -= self.num_tokens
        return self.server
