"""A connection to one rollout server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.errors import EngineFailure, InvalidRequest, ModelMismatch
from kdmesh.rpc import codec
from kdmesh.rpc.calls import UNARY_TIMEOUT_S, our_errors
from kdmesh.rpc.missing_images import with_images
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.rollouts import codec as rollout_codec
from kdmesh.rpc.rollouts.generate_stream import GenerateStream
from kdmesh.rpc.server_client import ServerClient
from kdmesh.tracing import spans
from kdmesh.types import Int32Array, PlacedImage, RolloutDescription, Sample, Sampling
from kdmesh.v1 import common_pb2
from kdmesh.v1 import rollout_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutStub

if TYPE_CHECKING:
    from kdmesh.v1.rollout_pb2_grpc import RolloutAsyncStub

_MAX_REQUESTS = 4096  # the server bounds them by tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ask:
    """Samples of one prompt."""

    prompt_ids: Int32Array
    sampling: Sampling
    num_samples: int
    seed: int | None  # sample i uses seed + i
    min_weight_version: int  # 0 accepts any
    images: tuple[PlacedImage, ...] = ()  # of the prompt

    @property
    def num_tokens(self) -> int:
        """The most that all its samples come to, the prompt counted for each."""
        return self.num_samples * (len(self.prompt_ids) + self.sampling.max_new_tokens)


class RolloutClient(ServerClient):
    """Lost for good when its stream ends. Belongs to the event loop that connected it.

    Attributes:
        address: host:port.
        model: what the server said of itself when it was connected.
        weight_version: of the weights that it serves, as far as this side knows.
    """

    model: RolloutDescription
    weight_version: int
    _stub: RolloutAsyncStub

    def __init__(self, address: str, access: AccessConfig) -> None:
        """Use `connect`."""
        super().__init__(address, access)
        self._stub = RolloutStub(self._channel)

    @classmethod
    async def connect(
        cls, address: str, *, job: str, architecture_fingerprint: str = "", access: AccessConfig = OPEN_ACCESS
    ) -> Self:
        """One attempt: a server that is not there or still loads is Unavailable.

        Args:
            address: host:port.
            job: name of the job, for the metrics of a server that asks nobody who they are.
            architecture_fingerprint: refuse a server with another model; empty accepts any.
            access: how to get in.

        Raises:
            Unavailable: not reachable, loading or draining.
            Unauthenticated, PermissionDenied: the server does not let this job in.
            ConfigError: `access` cannot be used, or another kind of server answers there.
            ModelMismatch: another model is served there.
            EngineFailure: something else answers there.
        """
        client = cls(address, access)
        try:
            await client._open(job, architecture_fingerprint)
        except BaseException:
            await client.close()
            raise
        return client

    async def _open(self, job: str, architecture_fingerprint: str) -> None:
        with our_errors(self.address, wanted="rollout server"):
            described = await self._stub.Describe(pb.DescribeRolloutRequest(), timeout=UNARY_TIMEOUT_S)
        try:
            self.model = rollout_codec.rollout_description_from_wire(described)
        except InvalidRequest as error:
            raise EngineFailure(f"{self.address} describes an impossible model: {error}") from None
        self.weight_version = self.model.weight_version
        if architecture_fingerprint not in ("", self.model.architecture_fingerprint):
            raise ModelMismatch(
                f"{self.address} serves architecture {self.model.architecture_fingerprint}; "
                f"this job is for {architecture_fingerprint}"
            )
        self._stream = GenerateStream(self._stub, self.address, job=job, on_end=self._lose)
        self._closing.push_async_callback(self._stream.close)

    @property
    def max_requests(self) -> int:
        """Most requests that may be under way at once."""
        return _MAX_REQUESTS

    @property
    def is_local(self) -> bool:
        """Samples are small: no server is nearer than another."""
        return False

    async def ask_load(self) -> None:
        """A rollout server serves one job, which knows what it has asked for."""

    async def generate(self, ask: Ask, on_sample: Callable[[int, Sample], None], deadline: Deadline) -> None:
        """Return when every sample has been given to `on_sample`, with its index. Cancelling aborts the rest.

        Raises:
            RpcError: as rollout.proto says of Generate and PutImages; samples may have come before.
            EngineFailure: an answer is not one to this request.
        """
        with spans.span("samples", address=self.address, samples=ask.num_samples):
            await self._generate(ask, on_sample, deadline)

    async def _generate(self, ask: Ask, on_sample: Callable[[int, Sample], None], deadline: Deadline) -> None:
        request = pb.GenerateRequest(
            prompt_ids=ask.prompt_ids.tolist(),
            num_samples=ask.num_samples,
            sampling=rollout_codec.sampling_to_wire(ask.sampling),
            seed=ask.seed,
            architecture_fingerprint=self.model.architecture_fingerprint,
            min_weight_version=ask.min_weight_version,
            deadline_ms=max(1, min(round(deadline.left_s * 1000), 2**32 - 1)),
            images=codec.images_to_wire(ask.images),
            traceparent=spans.current(),
        )

        async def put(images: Sequence[bytes]) -> None:
            with our_errors(self.address):
                await self._stub.PutImages(common_pb2.PutImagesRequest(images=images), timeout=deadline.left_s)

        await with_images(
            lambda: self._stream.ask(request, ask.prompt_ids, on_sample, images=ask.images), put, ask.images
        )
