"""What the rollout server needs from whatever runs the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kdmesh.serving.engine.revival import Mortal
from kdmesh.serving.engine.sleep import Sleeper
from kdmesh.serving.images import Vision
from kdmesh.types import DType, Int32Array, PlacedImage, Sample, Sampling
from kdmesh.weights.target import WeightTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescription:
    """A loaded model, and the most an engine decodes at a time."""

    name: str  # for people, never compared
    architecture_fingerprint: str
    tokenizer_fingerprint: str  # empty: the model has no tokenizer
    vocabulary_size: int  # ids at or above it are never drawn
    dtype: DType  # of the weights
    max_sequence_tokens: int  # of prompt and response together
    max_running: int  # samples decoded together
    is_deterministic: bool
    vision: Vision | None = None  # None: it reads no images


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """One sample to draw."""

    key: int  # chosen by the caller, never used again
    prompt_ids: Int32Array  # [P], P >= 1
    sampling: Sampling
    seed: int | None  # None draws differently each time
    images: tuple[PlacedImage, ...] = ()  # of the prompt, at hand


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finished:
    """One sample that was drawn."""

    key: int
    sample: Sample


class Engine(WeightTarget, Sleeper, Protocol):
    """A model that is sampled from. Blocking, and called from one thread only, but for what WeightTarget says.

    Weights have version 0 at the start. `commit` comes between two steps; what is under way then goes on with the
    new weights, its keys and values computed anew, so that every log-probability is that of a forward pass of the
    weights it was drawn with.
    """

    def load(self) -> EngineDescription:
        """Load the model; called once, before anything else.

        Raises:
            ConfigError: the configured model cannot be used; the message names it.
        """
        ...

    def add(self, order: Order) -> None:
        """Begin a sample with the next step. It is valid for the model, and there is room: see max_running."""
        ...

    def abort(self, key: int) -> None:
        """Forget a sample; nothing happens when it is not under way."""
        ...

    def step(self) -> list[Finished]:
        """Draw the next token of what is under way, and of what was added; returns what has finished.

        An engine that draws in other processes goes on by itself, and returns when something has finished, or
        when it is interrupted. When it raises, everything under way is in doubt: abort it.
        """
        ...

    def interrupt(self) -> None:
        """Let a step that waits return, so that samples can join or leave; called from any thread."""
        ...

    @property
    def num_running(self) -> int:
        """Samples under way."""
        ...

    @property
    def num_drawn_tokens(self) -> int:
        """Tokens drawn since the start."""
        ...

    @property
    def num_prefilled_tokens(self) -> int:
        """Prompt tokens computed since the start; samples of one prompt that begin together share them."""
        ...


@runtime_checkable
class ProcessEngine(Engine, Mortal, Protocol):
    """An engine whose samples other processes draw. Those that are started anew have the weights of the start."""

    def close(self) -> None:
        """End them, also while they load. May be called from any thread."""
        ...
