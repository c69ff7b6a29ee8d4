"""All teacher servers of a job, for a thread that blocks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.errors import InvalidRequest, Unavailable
from kdmesh.losses.head import OutputHead
from kdmesh.rpc.fleet.discovery import Discovery
from kdmesh.rpc.fleet.routing import DEFAULT_ROUTING, RoutingPolicy
from kdmesh.rpc.fleet.server_pool import ServerPool
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherRows
from kdmesh.rpc.teachers.doors import DoorChoice, Wire
from kdmesh.rpc.teachers.fleet import TeacherFleet
from kdmesh.rpc.teachers.needs import Needs
from kdmesh.rpc.teachers.pending_rows import ArrivedRows, PendingRows
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.rpc.teachers.splitting import split
from kdmesh.types import CacheAnswer, ModelDescription, TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientStats:
    """What a pool has done since it was opened."""

    doors: Mapping[str, str]  # through which rows come now, and why; more than one only with several teachers
    requests: int  # answered
    retries: int  # requests that were sent once more
    moved: int  # answers that waited so long that they were copied out of the teacher's slab
    imbalance: float | None  # most over mean tokens sent to a teacher in the last minute; None with fewer than two

    @property
    def door(self) -> str:
        """Their names: shm, stream, or shm+stream."""
        return "+".join(sorted(self.doors))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What all requests for a group's rows have in common."""

    layers: tuple[int, ...]  # whose outputs are in them
    deadline: Deadline
    weight_version: int


_KEPT_S = 24 * 3600.0  # of a request that nobody waits for yet


class TeacherPool(ServerPool[TeacherFleet]):
    """Asks for rows ahead of their use; one background thread does the rest. A context manager.

    Requests go to the replica that answers first, by what the replicas say they have to do. When a replica dies, its
    requests are sent to another one, or to itself when it is back; that is safe, because the rows are the same.
    Nothing is retried past the deadline.

    Shared memory is lent by the teacher: rows that have arrived and are not waited for within
    `move_after_s` are copied to this process's memory, so that a slow job starves no other, and no rank of
    this one.

    Raises, when opened:
        DeadlineExpired: no teacher answers within `connect_s`.
        ModelMismatch: the teachers serve different models, or one does not give the outputs of `layers`.
        Unauthenticated, PermissionDenied: a teacher does not let this job in.
        ConfigError: `door` is shm, and a teacher is not on this node; or `access` cannot be used.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        job: str,
        door: DoorChoice = "auto",
        deadline_s: float = 300.0,
        move_after_s: float = 2.0,
        access: AccessConfig = OPEN_ACCESS,
        routing: RoutingPolicy = DEFAULT_ROUTING,
        wire: Wire = "exact",
        gpu: torch.device | None = None,
        uses_cache: bool = True,
        layers: Sequence[int] = (),
        connect_s: float | None = None,
    ) -> None:
        """Connect. Blocks until a teacher is ready.

        Args:
            addresses: of the replicas of one model, as Discovery takes them; at least one.
            job: name for the logs and metrics of teachers that ask nobody who they are.
            door: how rows come; auto takes shared memory where a teacher is on this node.
            deadline_s: longest wait for one request, retries and a teacher's restart included.
            move_after_s: see above.
            access: how to get in.
            routing: which replica gets a request.
            wire: how a stream carries rows; fp8 halves the bytes and rounds.
            gpu: a device of this process, which rows may pass through on their way to the CPU; None where it has none.
            uses_cache: whether teachers that keep rows may keep these.
            layers: whose outputs are to follow the final hidden state in every row, ascending; counted from 1.
            connect_s: longest wait for the first server; None: as long as for a request.
        """
        assert addresses
        self._move_after_s = move_after_s
        self._layers = tuple(layers)
        self._requests = self._moved = 0
        options = SessionOptions(job=job, door=door, access=access, wire=wire, gpu=gpu)
        super().__init__(
            lambda: TeacherFleet(Discovery(addresses), options, routing=routing, uses_cache=uses_cache, layers=layers),
            deadline_s=deadline_s,
            connect_s=connect_s,
        )

    def describe(self) -> ModelDescription:
        """The model that every teacher serves; limits are those of the narrowest that takes what is required.

        They are of rows with `layers`.
        """
        return self._fleet.model

    def row_bytes(self, *, has_layers: bool = True) -> int:
        """Bytes of a row, with the outputs of `layers` or without."""
        model = self._fleet.model
        return model.num_columns(self._layers if has_layers else ()) * model.dtype.size_bytes

    def require(self, needs: Needs) -> None:
        """From now on leave teachers out, with a warning, that take less, unless no teacher takes so much. Blocks.

        One that comes back, or joins, with limits below these is not used either, but for as long as it has them.
        """
        self._loop.run(self._fleet.require, needs)

    def submit(self, sequences: Sequence[TokenSequence], *, keep: bool = False, has_layers: bool = True) -> PendingRows:
        """Ask for the rows of a group of sequences, in their order. Does not block. Any thread.

        A group beyond the teacher's limits is asked for in several requests.

        Args:
            keep: copy them to this process's memory as they come: they will not be waited for soon, and their deadline
                begins when they are.
            has_layers: whether the outputs of `layers` are to be in the rows.

        Raises:
            InvalidRequest: there is no sequence, or one exceeds the limits by itself.
        """
        parts = split(sequences, self._fleet.model)
        version = self._fleet.weight_version
        deadline = Deadline.after(_KEPT_S if keep else self._deadline_s)
        wanted = _Wanted(layers=self._layers if has_layers else (), deadline=deadline, weight_version=version)
        answering = self._loop.start(self._answer, parts, wanted, keep)
        return PendingRows(answering, longest_wait_s=self._deadline_s if keep else None)

    def find_cached(self, sequences: Sequence[TokenSequence], *, has_layers: bool = True) -> CacheAnswer:
        """What the teacher has kept of a group that one request may hold; of several replicas, one is asked. Blocks.

        Args:
            has_layers: whether it is asked for rows with the outputs of `layers`, which are others.

        Raises:
            DeadlineExpired: no teacher answered in time.
            RpcError: the request is refused.
        """
        deadline = Deadline.after(self._deadline_s)
        layers = self._layers if has_layers else ()
        return self._loop.run(self._fleet.find_cached, sequences, deadline, self._fleet.weight_version, layers=layers)

    @property
    def weight_version(self) -> int:
        """Of the weights that rows are asked of now."""
        return self._fleet.weight_version

    def blank_rows(self, num_rows: int, *, has_layers: bool = True) -> TeacherRows:
        """Zeros, as if they had been asked for now; nobody is asked."""
        model = self._fleet.model
        columns = model.num_columns(self._layers if has_layers else ())
        rows_RD = torch.zeros(num_rows, columns, dtype=getattr(torch, model.dtype.value))
        return TeacherRows(rows_RD=rows_RD, weight_version=self._fleet.weight_version, is_borrowed=False)

    def blank_head(self) -> tuple[OutputHead, int]:
        """As `head`, of zeros; nobody is asked."""
        model, spec = self._fleet.model, self._fleet.model.head
        weight_VD = torch.zeros(spec.padded_vocabulary_size, model.hidden_size, dtype=getattr(torch, model.dtype.value))
        head = OutputHead(
            weight_VD=weight_VD,
            bias_V=weight_VD.new_zeros(len(weight_VD)) if spec.has_bias else None,
            logit_scale=spec.logit_scale,
            logit_softcap=spec.logit_softcap,
        )
        return head, self._fleet.weight_version

    def follow(self, weight_version: int) -> None:
        """From now on ask for rows of these weights, which every teacher has been given."""
        self._fleet.follow(weight_version)

    def head(self) -> tuple[OutputHead, int]:
        """The output head over the padded vocabulary, and its weight version. Blocks.

        Over shared memory its tensors are views of the teacher's memory, which stays good after the teacher's end.

        Raises:
            DeadlineExpired: no teacher answered in time.
            Unavailable: it was given up.
        """
        fetching = self._loop.start(self._fleet.head, Deadline.after(self._deadline_s))
        try:
            return fetching.result()
        except concurrent.futures.CancelledError:
            raise Unavailable("the teacher's head was given up, or the connection to the teachers closed") from None

    def stats(self) -> ClientStats:
        """What was done so far."""
        return ClientStats(
            doors=self._fleet.doors,
            requests=self._requests,
            retries=self._fleet.retries,
            moved=self._moved,
            imbalance=self._fleet.imbalance,
        )

    # On the loop

    async def _answer(self, parts: Sequence[tuple[TokenSequence, ...]], wanted: _Wanted, keep: bool) -> ArrivedRows:
        if len(parts) > 1:
            return ArrivedRows(await self._joined(parts, wanted))
        rows = await self._ask(parts[0], wanted)
        arrived = ArrivedRows(rows)
        if rows.is_borrowed and keep:
            arrived.move()
        elif rows.is_borrowed:
            asyncio.get_running_loop().call_later(self._move_after_s, self._move, weakref.ref(arrived))
        return arrived

    async def _ask(self, sequences: Sequence[TokenSequence], wanted: _Wanted) -> TeacherRows:
        try:
            rows = await self._fleet.ask(sequences, wanted.deadline, wanted.weight_version, layers=wanted.layers)
        except InvalidRequest:
            parts = split(sequences, self._fleet.model)
            if len(parts) == 1:
                raise
            # A teacher has come, or come back, that takes less at once.
            return await self._joined(parts, wanted)
        self._requests += 1
        return rows

    async def _joined(self, parts: Sequence[tuple[TokenSequence, ...]], wanted: _Wanted) -> TeacherRows:
        """The rows of several requests in one tensor of this process.

        Each part is copied as it comes: there may be more parts than slots.
        """
        model = self._fleet.model
        ends = list(itertools.accumulate(sum(s.num_rows for s in part) for part in parts))
        joined_RD = torch.empty(ends[-1], model.num_columns(wanted.layers), dtype=getattr(torch, model.dtype.value))

        async def fill(part: Sequence[TokenSequence], begin: int, end: int) -> None:
            joined_RD[begin:end] = (await self._ask(part, wanted)).rows_RD

        try:
            async with asyncio.TaskGroup() as asking:
                for part, begin, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
                    asking.create_task(fill(part, begin, end))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return TeacherRows(rows_RD=joined_RD, weight_version=wanted.weight_version, is_borrowed=False)

    def _move(self, arrived: weakref.ref[ArrivedRows]) -> None:
        rows = arrived()
        if rows is not None and rows.move():
            self._moved += 1
