"""What the teacher server needs from whatever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kdmesh.handles.slab.memory import Segment
from kdmesh.serving.engine.revival import Mortal
from kdmesh.serving.engine.sleep import Sleeper
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.serving.images import Vision
from kdmesh.types import DType, HeadSpec, TokenSequence
from kdmesh.weights.target import WeightTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescription:
    """A loaded model, and the most an engine computes at a time."""

    name: str  # for people, never compared
    model_fingerprint: str  # equal to architecture_fingerprint where that is set: see teacher.proto
    tokenizer_fingerprint: str  # empty: the model has no tokenizer
    hidden_size: int
    dtype: DType  # of the rows
    head: HeadSpec
    max_sequence_tokens: int  # longest sequence the model takes, at most max_batch_tokens
    max_batch_tokens: int  # tokens of one prefill call, over all its jobs
    is_deterministic: bool
    architecture_fingerprint: str = ""  # empty: the weights are frozen. Set: the engine is an UpdatableEngine
    vision: Vision | None = None  # None: it reads no images
    num_layers: int = 0  # whose outputs the engine can write, numbered from 1; 0: it writes final hidden states alone

    def row_bytes(self, layers: Sequence[int]) -> int:
        """Of a row that has the outputs of these layers behind the final hidden state."""
        return self.hidden_size * (1 + len(layers)) * self.dtype.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillJob:
    """One request, and where its rows go."""

    sequences: tuple[TokenSequence, ...]
    out: memoryview  # writable bytes, contiguous, exactly num_rows rows long, each as long as the layers make it
    layers: tuple[int, ...] = ()  # ascending; whose outputs follow the final hidden state in every row
    segment: int | None = None  # number of the segment that `out` is a part of; None: ordinary memory
    offset_bytes: int = 0  # where in the segment `out` begins

    @property
    def num_tokens(self) -> int:
        """Over all sequences."""
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def num_rows(self) -> int:
        """Over all sequences."""
        return sum(sequence.num_rows for sequence in self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadParts:
    """The output head's matrices as contiguous row-major bytes; valid until weights are committed."""

    weight: memoryview  # [padded_vocabulary_size, hidden_size]
    bias: memoryview | None  # [padded_vocabulary_size]; None exactly when head.has_bias is false
    dtype: DType  # of both


class Engine(Sleeper, Protocol):
    """A model. Blocking, and called from one thread only."""

    def load(self) -> EngineDescription:
        """Load the model; called once, before anything else.

        Raises:
            ConfigError: the configured model cannot be used; the message names it.
        """
        ...

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        """Write the final-norm hidden states each job asks for into its `out`, with the outputs of its layers.

        Rows come in the order of the job's sequences, each sequence's positions in
        theirs. The jobs have at most max_batch_tokens tokens together; they are valid
        for the model, and their images are at hand. No reference to `out` is kept after the return.
        """
        ...

    def head_parts(self) -> HeadParts:
        """The output head that belongs to the rows; called after load, and after every commit."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """An engine that computes, and the thread it lives on."""

    engine: Engine
    thread: EngineThread
    model: EngineDescription
    check: Callable[[], None]  # blocks on the engine's thread; raises when the engine is broken for good


@runtime_checkable
class UpdatableEngine(Engine, WeightTarget, Protocol):
    """An engine whose weights can be replaced; `commit` comes between two prefills, in the engine's thread."""


@runtime_checkable
class ProcessEngine(Engine, Mortal, Protocol):
    """An engine whose rows other processes compute, and write into segments they have mapped.

    It is loaded before there are slots, because they must map each one while it is made. What
    follows may be called from any thread.
    """

    def adopt(self, segment: Segment) -> None:
        """Let them map a segment, as `SegmentWriter`; jobs may name it from then on."""
        ...

    def drop(self, segment: Segment) -> None:
        """No job names this segment any more."""
        ...

    def num_cached_tokens(self) -> int:
        """Tokens of requests that they had computed before, and did not again, so far."""
        ...

    def close(self) -> None:
        """End them, also while they load."""
        ...
