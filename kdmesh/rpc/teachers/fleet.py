"""The teacher servers of a job, all of the same model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from kdmesh.errors import ModelMismatch, Unavailable
from kdmesh.losses.head import OutputHead
from kdmesh.rpc.fleet.discovery import Discovery
from kdmesh.rpc.fleet.replicas import Replicas
from kdmesh.rpc.fleet.routing import DEFAULT_ROUTING, RoutingPolicy
from kdmesh.rpc.fleet.server_fleet import ServerFleet
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient, TeacherRows
from kdmesh.rpc.teachers.needs import Needs
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.types import CacheAnswer, ModelDescription, TokenSequence

log = logging.getLogger(__name__)

_LIMITS = ("max_sequence_tokens", "max_request_tokens", "max_request_rows")


class TeacherFleet(ServerFleet[TeacherClient]):
    """Replicas of one model. Belongs to one event loop.

    Attributes:
        weight_version: of the weights that rows are wanted of; the first teacher's, until `follow`.
    """

    def __init__(
        self,
        discovery: Discovery,
        options: SessionOptions,
        *,
        routing: RoutingPolicy = DEFAULT_ROUTING,
        uses_cache: bool = True,
        layers: Sequence[int] = (),
    ) -> None:
        self._options = options
        self._layers = tuple(layers)
        self._uses_cache = uses_cache
        self._model: ModelDescription | None = None
        self.weight_version = 0
        self._is_following = False
        self._fingerprint = ""  # of the first one's model
        self._outdated: set[str] = set()  # addresses of replicas that were found without the weights that are wanted
        self._needs = Needs()
        self._too_narrow: dict[str, str] = {}  # what replicas, by their addresses, take too little of
        self._replicas = Replicas(
            "teacher",
            discovery,
            self._connect,
            routing=routing,
            hopeless=self._hopeless,
        )

    @property
    def model(self) -> ModelDescription:
        """What every replica serves, with the narrowest limits of those that are asked; after `start`.

        They are of requests with the outputs of this job's layers.
        """
        assert self._model is not None
        return self._model

    @property
    def doors(self) -> dict[str, str]:
        """The doors in use now, and why; of several teachers behind one kind of door the last one's reason."""
        return {client.door.name: client.door_reason for client in self._replicas.clients}

    @property
    def imbalance(self) -> float | None:
        """See Replicas."""
        return self._replicas.imbalance

    def follow(self, weight_version: int) -> None:
        """Every replica has new weights, of this version; a replica that is found without them is not used."""
        self.weight_version, self._is_following = weight_version, True
        self._outdated.clear()

    async def require(self, needs: Needs) -> None:
        """From now on leave replicas out that take less. Where none of those that are there takes it, all stay."""
        self._needs |= needs
        clients = self._replicas.clients
        fit = [client for client in clients if not self._needs.missed_by(self._seen(client))]
        if not fit:
            return
        self._model = self._seen(fit[0])
        for client in fit:
            self._narrow(self._seen(client))
        for client in clients:
            if client not in fit:
                await client.close()  # it is connected again, and left out then

    async def ask(
        self, sequences: Sequence[TokenSequence], deadline: Deadline, weight_version: int, *, layers: Sequence[int] = ()
    ) -> TeacherRows:
        """The rows of a request that the model's limits allow; the same whichever replica answers.

        Args:
            layers: whose outputs they have: of this job's, all or none.

        Raises:
            DeadlineExpired: no replica answered in time.
            ModelMismatch: a replica has other weights than those of `weight_version`, or all have lost them.
            RpcError: the request is refused, or the engine failed on it.
        """

        async def prefill(client: TeacherClient) -> TeacherRows:
            rows = await client.prefill(
                sequences,
                deadline,
                layers=layers,
                weight_version=weight_version,
                uses_cache=self._uses_cache,
            )
            if rows.weight_version != weight_version:
                raise ModelMismatch(
                    f"the teacher answered with weight version {rows.weight_version}; asked for was {weight_version}"
                )
            return rows

        num_tokens = sum(sequence.num_tokens for sequence in sequences)
        return await self._replicas.somewhere(prefill, num_tokens, deadline, may_hedge=True)

    async def find_cached(
        self, sequences: Sequence[TokenSequence], deadline: Deadline, weight_version: int, *, layers: Sequence[int] = ()
    ) -> CacheAnswer:
        """What one replica has kept of a request's sequences. Raises as `ask`."""

        async def find(client: TeacherClient) -> CacheAnswer:
            return await client.find_cached(sequences, layers=layers, weight_version=weight_version)

        return await self._replicas.somewhere(find, 0, deadline, takes_slot=False)

    async def head(self, deadline: Deadline) -> tuple[OutputHead, int]:
        """The output head and its weight version. Raises as `ask`."""
        return await self._replicas.somewhere(TeacherClient.head, 0, deadline, takes_slot=False)

    async def _connect(self, address: str) -> TeacherClient:
        client = await TeacherClient.connect(
            address,
            self._options,
            model_fingerprint=self._fingerprint,
            on_load=partial(self._replicas.note_load, address),
        )
        try:
            self._admit(client)
        except (ModelMismatch, Unavailable):
            await client.close()
            raise
        return client

    def _admit(self, client: TeacherClient) -> None:
        """All replicas must serve the same; the narrowest limits count, of those that take what the job needs."""
        self._check_layers(client)
        ours, theirs = self._model, self._seen(client)
        if ours is None:
            self._model, self._fingerprint = theirs, theirs.model_fingerprint
            self.weight_version = theirs.weight_version
            return
        self._check_version(client)
        for name in ("model_fingerprint", "tokenizer_fingerprint", "hidden_size", "dtype", "head"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ModelMismatch(
                    f"{client.address} has {name} {getattr(theirs, name)}, and the other teachers, or itself "
                    f"before, {getattr(ours, name)}; all teachers of a job must serve the same model"
                )
        self._check_needs(client)
        self._narrow(theirs)

    def _seen(self, client: TeacherClient) -> ModelDescription:
        """What it serves, with its limits of requests with the outputs of this job's layers."""
        return client.model.for_layers(self._layers)

    def _narrow(self, theirs: ModelDescription) -> None:
        assert self._model is not None
        limits = {name: min(getattr(self._model, name), getattr(theirs, name)) for name in _LIMITS}
        self._model = replace(self._model, **limits)

    def _check_needs(self, client: TeacherClient) -> None:
        """It may come back as it was, so that it is not refused for ever."""
        address, missed = client.address, self._needs.missed_by(self._seen(client))
        was, self._too_narrow[address] = self._too_narrow.get(address, ""), missed
        if not missed:
            return
        if missed != was:
            log.warning("a teacher is left out", extra={"address": address, "reason": f"it {missed}"})
        raise Unavailable(f"it {missed}")

    def _check_layers(self, client: TeacherClient) -> None:
        known = client.model.num_layers
        if self._layers and not known:
            raise ModelMismatch(
                f"teacher {client.model.name} at {client.address} gives final hidden states alone, and this job wants "
                f"the outputs of its layers {list(self._layers)}: that needs a server of this release, with "
                "engine transformers, or with sglang whose start found them right: its log says why it did not"
            )
        if self._layers and self._layers[-1] > known:
            raise ModelMismatch(
                f"this job wants the output of layer {self._layers[-1]} of teacher {client.model.name}, which has "
                f"layers 1 to {known}"
            )

    def _check_version(self, client: TeacherClient) -> None:
        """Before `follow`, replicas whose weights can be replaced may differ: they are about to get the same."""
        theirs = client.model
        self._outdated.discard(client.address)
        if theirs.weight_version == self.weight_version or (theirs.architecture_fingerprint and not self._is_following):
            return
        message = (
            f"{client.address} has weight version {theirs.weight_version}; this job's teacher has {self.weight_version}"
        )
        if theirs.architecture_fingerprint:
            self._outdated.add(client.address)
            raise Unavailable(f"{message}, and gets it with the next update")
        raise ModelMismatch(message)

    def _hopeless(self) -> ModelMismatch | None:
        """Whoever waits for rows would wait in vain: the next update comes after them."""
        addresses = self._replicas.addresses
        if not addresses or not addresses <= self._outdated:
            return None
        return ModelMismatch(
            f"no teacher has weight version {self.weight_version} any more: {', '.join(sorted(addresses))} "
            "were started anew. The same command continues from the last checkpoint, and brings them its weights"
        )
