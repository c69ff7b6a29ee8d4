"""How a rank of the benchmark `routing` chooses: as a trainer of ours does, in turn, or by a central plan."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial

from benchmarks.routing_fleet import ONE_WAY_S, Clock, Request, Teacher
from kdmesh.rpc.fleet.routing import Router, RoutingPolicy, SentRequest
from kdmesh.types import ServerLoad


class Routed:
    """The Router of one rank, told what the client of a real one tells it.

    Args:
        asks: whether those that are drawn say their load before one is chosen; else only replies tell it.
    """

    def __init__(
        self, clock: Clock, teachers: Mapping[str, Teacher], *, policy: RoutingPolicy, asks: bool, seed: int
    ) -> None:
        self._clock = clock
        self._teachers = teachers
        self._asks = asks
        self._router = Router(policy, random.Random(seed))
        self._connected: dict[str, None] = {}
        self._sent: dict[Request, SentRequest] = {}
        for name in teachers:
            self.found(name)

    def send(self, request: Request) -> None:
        """Draw, look, decide."""
        now_s = self._clock.now_s
        drawn = self._router.draw([n for n in self._connected if self._router.barred_s(n, now_s) == 0], now_s)
        if self._asks:
            self._clock.after(ONE_WAY_S, partial(self._look, request, drawn))
        else:
            self._decide(request, drawn)

    def answered(self, request: Request, load: ServerLoad) -> None:
        """Tell the Router."""
        self._router.reported(request.teacher, load, self._clock.now_s)
        self._router.answered(self._sent.pop(request), self._clock.now_s)

    def failed(self, request: Request) -> None:
        """Tell the Router; the connection is gone, too."""
        self._router.unanswered(self._sent.pop(request), self._clock.now_s, is_its_fault=False)
        self.lost(request.teacher)

    def lost(self, name: str) -> None:
        """Until it is found again."""
        if name in self._connected:
            del self._connected[name]
            self._router.leave(name)

    def found(self, name: str) -> None:
        """It may be drawn."""
        self._connected[name] = None
        self._router.join(name, self._clock.now_s, is_local=False)

    def _look(self, request: Request, drawn: Sequence[str]) -> None:
        loads = {name: self._teachers[name].load for name in drawn if self._teachers[name].is_there}
        self._clock.after(ONE_WAY_S, partial(self._hear, request, loads))

    def _hear(self, request: Request, loads: Mapping[str, ServerLoad]) -> None:
        there = [name for name in loads if name in self._connected]
        for name in there:
            self._router.reported(name, loads[name], self._clock.now_s)
        if there:
            self._decide(request, there)
        else:
            self.send(request)

    def _decide(self, request: Request, names: Sequence[str]) -> None:
        name = self._router.best(names, request.tokens, self._clock.now_s)
        self._sent[request] = self._router.sent(name, request.tokens, self._clock.now_s)
        _bring(self._clock, request, self._teachers[name])


class InTurn:
    """One teacher after the other, from a random one on."""

    def __init__(self, clock: Clock, teachers: Mapping[str, Teacher], *, seed: int) -> None:
        self._clock = clock
        self._teachers = teachers
        self._names = list(teachers)
        self._next = random.Random(seed).randrange(len(teachers))
        self._lost: set[str] = set()

    def send(self, request: Request) -> None:
        """To the next that is there."""
        while self._names[self._next] in self._lost:
            self._step()
        _bring(self._clock, request, self._teachers[self._names[self._next]])
        self._step()

    def answered(self, request: Request, load: ServerLoad) -> None:
        """Nothing is learnt from it."""

    def failed(self, request: Request) -> None:
        """The connection is gone."""
        self._lost.add(request.teacher)

    def lost(self, name: str) -> None:
        """Until it is found again."""
        self._lost.add(name)

    def found(self, name: str) -> None:
        """It has its turn again."""
        self._lost.discard(name)

    def _step(self) -> None:
        self._next = (self._next + 1) % len(self._names)


class Planned(InTurn):
    """As the plan of the job's step says; in turn where that teacher is not there."""

    def send(self, request: Request) -> None:
        """To its place in the plan."""
        name = self._names[request.planned]
        if name in self._lost:
            super().send(request)
        else:
            _bring(self._clock, request, self._teachers[name])


def _bring(clock: Clock, request: Request, teacher: Teacher) -> None:
    request.teacher = teacher.name
    clock.after(ONE_WAY_S, partial(teacher.take, request))
