"""Everything the teacher server can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdmesh.auth.config import is_loopback
from kdmesh.config import StrictModel
from kdmesh.serving.config import ListenConfig, Port
from kdmesh.serving.images_config import ImagesConfig
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.tracing.config import TracingConfig
from kdmesh_teacher.cache.config import CacheConfig
from kdmesh_teacher.sglang.config import SglangEngine

_LONGEST_S = 2_592_000  # 30 days; clients are told in 32 bits of milliseconds


class TransformersEngine(StrictModel):
    """Runs the model in this process with Hugging Face transformers, on the CPU or one GPU."""

    kind: Literal["transformers"] = "transformers"

    model: Path
    """Directory of a Hugging Face causal LM, or hf://OWNER/MODEL on the hub. Required."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of the weights and of the rows; auto keeps the one the checkpoint names."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU when there is one."""

    deterministic: bool = False
    """Compute every sequence alone, so that its rows are the same bits whatever else is served. Slower."""

    max_batch_tokens: int = Field(8192, ge=16)
    """Tokens prefilled together, over all requests of a batch."""

    threads: int | None = Field(None, ge=1)
    """CPU threads of the engine; unset takes as many as there are cores for it."""

    updatable: bool = False
    """Let one job replace the weights, for self-distillation; jobs that want a frozen teacher refuse such a server."""


class FakeEngine(StrictModel):
    """Makes rows from the ids alone, without a model; for tests and drills."""

    kind: Literal["fake"]

    hidden_size: int = Field(8, ge=1)
    """Columns of a row."""

    vocabulary_size: int = Field(64, ge=2)
    """Tokens of the made-up vocabulary."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Element type of the rows."""

    max_batch_tokens: int = Field(8192, ge=16)
    """Tokens answered together."""

    num_layers: int = Field(0, ge=0)
    """Made-up layers whose outputs can be asked for."""

    seconds_per_batch: float = Field(0.0, ge=0)
    """How long each batch pretends to take."""

    seconds_per_token: float = Field(0.0, ge=0)
    """How much longer for each of its tokens."""

    updatable: bool = False
    """Let one job replace the made-up weights."""


EngineConfig = Annotated[TransformersEngine | SglangEngine | FakeEngine, Field(discriminator="kind")]
"""Every engine."""


class ServerConfig(ListenConfig):
    """Where the server listens."""

    port: Port = 50051
    """gRPC port; 0 takes any free one."""

    rest_port: Port = 8051
    """Port of /healthz, /readyz, /metrics and /v1; 0 takes any free one."""

    runtime_dir: Path | None = None
    """Where the shared-memory broker's socket lies; unset takes a private directory of this user."""

    rdma: bool = False
    """Let clients read rows by RDMA, with NIXL; UCX_TLS must name RDMA transports only (docs/across_nodes.md)."""

    groups: bool = False
    """Send rows through a private group of two processes to clients that want that, for networks where NCCL is fast.
    gloo or NCCL choose ports, which clients must reach, and encrypt nothing, whatever `tls` says."""

    @model_validator(mode="after")
    def _gives_no_capability_away(self) -> ServerConfig:
        if self.rdma and not is_loopback(self.host) and (self.auth is None or self.tls is None):
            raise ValueError("rdma needs auth and tls: what it tells a client is the right to read its memory")
        return self


class SlabConfig(StrictModel):
    """The shared memory that answers lie in, and how long clients may keep it."""

    slots: int = Field(16, ge=1, le=4096)
    """Answers that can be held at the same time, over all sessions."""

    slot_mib: float = Field(64, gt=0, le=65536)
    """Size of one slot in MiB; one request's rows must fit in it."""

    slots_per_session: int = Field(8, ge=1)
    """Most slots one session may hold at once."""

    lease_s: float = Field(30.0, ge=0.1, le=_LONGEST_S)
    """Silence after which a session ends."""

    claim_s: float = Field(30.0, ge=0.1, le=_LONGEST_S)
    """How long an answer waits to be claimed."""

    max_abandoned: int = Field(16, ge=0)
    """Slots whose memory a silent client may still map. At this many the slot is not replaced, only withheld."""


class QueueConfig(StrictModel):
    """Requests that wait for the engine."""

    max_tokens: int = Field(1_000_000, ge=1)
    """Tokens waiting, over all jobs; when there are so many, a job gets Unavailable that has its share of them."""

    max_wait_s: float = Field(120.0, gt=0)
    """Longest wait for the engine or a slot; a request's own deadline may be shorter."""


class TeacherJobTerms(JobTerms):
    """What one job may take of a teacher."""

    max_bytes_in_flight: int | None = Field(None, ge=1)
    """Bytes of the slab that it may hold, in whole slots and at least one, until it releases them; null: no limit."""


class TeacherJobs(StrictModel):
    """The jobs that share a teacher. A job is known by the name that its sessions carry."""

    defaults: TeacherJobTerms = TeacherJobTerms()
    """For every job, where no override says otherwise."""

    overrides: dict[str, TeacherJobTerms] = Field({}, max_length=1000)
    """By the job's name; a key that is left out is that of `defaults`."""

    file: Path | None = None
    """YAML or JSON file with further `overrides`, which count before those; read again when it changes."""


class TeacherConfig(StrictModel):
    """A teacher server."""

    engine: EngineConfig
    """The model and how it is held."""

    server: ServerConfig = ServerConfig()
    """Where the server listens."""

    slab: SlabConfig = SlabConfig()
    """Shared memory for answers."""

    queue: QueueConfig = QueueConfig()
    """Requests that wait."""

    jobs: TeacherJobs = TeacherJobs()
    """What each job may take."""

    cache: CacheConfig = CacheConfig()
    """Rows that are kept."""

    images: ImagesConfig = ImagesConfig()
    """Images that are asked about, where the model reads them."""

    tracing: TracingConfig | None = None
    """Where traces of requests go whose steps are traced; null: nowhere."""

    @model_validator(mode="after")
    def _files_outlive_no_weights(self) -> TeacherConfig:
        if self.cache.directory is not None and self.engine.updatable:
            raise ValueError(
                "cache.directory outlives the weights of an engine that is updatable; use cache.memory_mib alone"
            )
        return self
