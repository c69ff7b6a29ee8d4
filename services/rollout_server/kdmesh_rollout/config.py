"""Everything the rollout server can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kdmesh.config import StrictModel
from kdmesh.serving.config import ListenConfig, Port
from kdmesh.serving.images_config import ImagesConfig
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.tracing.config import TracingConfig
from kdmesh_rollout.sglang.config import SglangEngine


class TransformersEngine(StrictModel):
    """Runs the model in this process with Hugging Face transformers, on the CPU or one GPU."""

    kind: Literal["transformers"] = "transformers"

    model: Path
    """Directory of a Hugging Face causal LM, or hf://OWNER/MODEL on the hub: the student's start, or a trained one."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of the weights, also of those that a trainer sends; auto keeps the one the checkpoint names."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU when there is one."""

    deterministic: bool = False
    """Decode every sample alone, so that a seed gives the same tokens whatever else is served. Slower."""

    max_sequence_tokens: int = Field(8192, ge=2)
    """Longest prompt and response together; the model's own limit may be lower."""

    max_running: int = Field(32, ge=1)
    """Samples decoded together; their keys and values, and states where layers have them, are what takes memory."""

    max_prefill_tokens: int = Field(8192, ge=16)
    """Prompt tokens computed in one step, so that long prompts do not hold up the others; at least one prompt."""

    threads: int | None = Field(None, ge=1)
    """CPU threads of the engine; unset takes as many as there are cores for it."""


class FakeEngine(StrictModel):
    """Makes tokens from the prompt, the seed and the weights alone, without a model; for tests and drills."""

    kind: Literal["fake"]

    vocabulary_size: int = Field(64, ge=2)
    """Tokens of the made-up vocabulary."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Element type of the made-up weights."""

    max_sequence_tokens: int = Field(8192, ge=2)
    """Longest prompt and response together."""

    max_running: int = Field(32, ge=1)
    """Samples decoded together."""

    seconds_per_step: float = Field(0.0, ge=0)
    """How long each decoding step pretends to take."""


EngineConfig = Annotated[TransformersEngine | SglangEngine | FakeEngine, Field(discriminator="kind")]
"""Every engine."""


class RolloutServerConfig(ListenConfig):
    """Where the server listens."""

    port: Port = 50061
    """gRPC port; 0 takes any free one."""

    rest_port: Port = 8061
    """Port of /healthz, /readyz, /metrics and /v1; 0 takes any free one."""


class QueueConfig(StrictModel):
    """Samples that wait for the engine."""

    max_tokens: int = Field(10_000_000, ge=1)
    """Tokens waiting, of prompts and of the longest responses allowed, over all jobs; when there are so many, a job
    gets Unavailable that has its share of them."""

    max_request_s: float = Field(3600.0, gt=0)
    """Longest time until a request's last sample; its own deadline may be shorter."""


class RolloutJobs(StrictModel):
    """The jobs that share a rollout server. A job is known by the name that its streams carry."""

    defaults: JobTerms = JobTerms()
    """For every job, where no override says otherwise."""

    overrides: dict[str, JobTerms] = Field({}, max_length=1000)
    """By the job's name; a key that is left out is that of `defaults`."""

    file: Path | None = None
    """YAML or JSON file with further `overrides`, which count before those; read again when it changes."""


class RolloutConfig(StrictModel):
    """A rollout server."""

    engine: EngineConfig
    """The model and how it is held."""

    server: RolloutServerConfig = RolloutServerConfig()
    """Where the server listens."""

    queue: QueueConfig = QueueConfig()
    """Samples that wait."""

    jobs: RolloutJobs = RolloutJobs()
    """What each job may take."""

    images: ImagesConfig = ImagesConfig()
    """Images in prompts, where the model reads them."""

    tracing: TracingConfig | None = None
    """Where traces of requests and of new weights go whose steps are traced; null: nowhere."""
