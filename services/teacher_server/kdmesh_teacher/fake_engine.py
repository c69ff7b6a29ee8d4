"""An engine without a model, whose rows can be predicted from the ids and the weights."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kdmesh.types import DType, HeadSpec, Int32Array, SleepTag, TokenSequence
from kdmesh.weights.manifest import TensorSpec
from kdmesh_teacher.config import FakeEngine as FakeEngineConfig
from kdmesh_teacher.engine import EngineDescription, HeadParts, PrefillJob

if TYPE_CHECKING:
    from kdmesh.weights.staging import StagedTensors

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiplying by it spreads bits upwards


class FakeEngine:
    """Row p is a hash of the ids up to p: like a causal model, it sees no later token and no other sequence.

    Its weights are one factor per column of a row, and the head; the factors are 1 at the start. Rows are exact when
    the factors are powers of two.
    """

    def __init__(self, config: FakeEngineConfig) -> None:
        self._config = config
        self._dtype = DType(config.dtype)
        self._trunk_D = np.ones(config.hidden_size, np.float32)
        self._head_VD = _first_head(config)
        self._staged: StagedTensors | None = None

    def load(self) -> EngineDescription:
        """Describe the made-up model."""
        config = self._config
        fingerprint = f"fa4e{config.hidden_size:08x}{config.vocabulary_size:08x}"
        return EngineDescription(
            name="fake",
            model_fingerprint=fingerprint,
            tokenizer_fingerprint=f"fa4e{config.vocabulary_size:08x}",
            hidden_size=config.hidden_size,
            dtype=self._dtype,
            head=HeadSpec(
                logit_scale=0.5,
                logit_softcap=30.0,
                vocabulary_size=config.vocabulary_size,
                padded_vocabulary_size=-(-config.vocabulary_size // 8) * 8,
                has_bias=True,
            ),
            max_sequence_tokens=config.max_batch_tokens,
            max_batch_tokens=config.max_batch_tokens,
            is_deterministic=True,
            architecture_fingerprint=fingerprint if config.updatable else "",
            num_layers=config.num_layers,
        )

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        """Write every job's rows; takes the configured time per call."""
        num_tokens = sum(sequence.num_tokens for job in jobs for sequence in job.sequences)
        time.sleep(self._config.seconds_per_batch + num_tokens * self._config.seconds_per_token)
        for job in jobs:
            rows_RC = np.concatenate([hidden_states(s, self._config.hidden_size, job.layers) for s in job.sequences])
            job.out[:] = as_bytes(rows_RC * np.tile(self._trunk_D, 1 + len(job.layers)), self._dtype)

    def head_parts(self) -> HeadParts:
        """A head whose rows are, at first, hashes of their token; the bias is half of its first column."""
        return HeadParts(
            weight=memoryview(as_bytes(self._head_VD, self._dtype)),
            bias=memoryview(as_bytes(self._head_VD[:, 0] * np.float32(0.5), self._dtype)),
            dtype=self._dtype,
        )

    @property
    def sleep_refusal(self) -> str:
        """It can sleep."""
        return ""

    def sleep(self, tags: Set[SleepTag]) -> None:
        """It holds nothing to give back."""

    def wake(self, tags: Set[SleepTag]) -> None:
        """Nothing to take."""

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """The factors and the head."""
        return (
            TensorSpec(name="trunk", shape=self._trunk_D.shape, dtype=self._dtype),
            TensorSpec(name="head", shape=self._head_VD.shape, dtype=self._dtype),
        )

    def begin(self) -> None:
        """Make room for new ones; only here is torch loaded."""
        from kdmesh.weights.staging import StagedTensors

        self._staged = StagedTensors(self.tensor_specs())

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """Copy bytes to that room."""
        assert self._staged is not None
        self._staged.write(tensor, offset_bytes, data)

    def commit(self, version: int) -> None:
        """Compute with the new ones from now on."""
        assert self._staged is not None
        tensors = self._staged.tensors
        self._trunk_D = tensors["trunk"].float().numpy()
        self._head_VD = tensors["head"].float().numpy()
        self._staged = None

    def discard(self) -> None:
        """Forget the new ones."""
        self._staged = None


def hidden_states(sequence: TokenSequence, hidden_size: int, layers: Sequence[int] = ()) -> npt.NDArray[np.float32]:
    """[R, (1 + layers) * D] the rows that the fake engine gives for `sequence`; exact in every dtype."""
    hashes_R = _prefix_hashes(sequence.token_ids)[sequence.positions]
    return np.concatenate([_spread(hashes_R * np.uint64(2 * layer + 1), hidden_size) for layer in (0, *layers)], 1)


def _first_head(config: FakeEngineConfig) -> npt.NDArray[np.float32]:
    padded = -(-config.vocabulary_size // 8) * 8
    seeds_V = (np.arange(padded, dtype=np.uint64) + np.uint64(1)) * _ODD
    return _spread(seeds_V, config.hidden_size)


def as_bytes(values: npt.NDArray[np.float32], dtype: DType) -> bytes:
    """The values as little-endian bytes; they must be exact in `dtype`."""
    match dtype:
        case DType.FLOAT32:
            return values.astype("<f4").tobytes()
        case DType.FLOAT16:
            return values.astype("<f2").tobytes()
        case DType.BFLOAT16:  # numpy lacks it: the upper half of a float32 whose lower half is 0
            return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def _prefix_hashes(token_ids: Int32Array) -> npt.NDArray[np.uint64]:
    places = np.arange(1, len(token_ids) + 1, dtype=np.uint64) * _ODD
    return np.cumsum((token_ids.astype(np.uint64) + np.uint64(1)) * places, dtype=np.uint64)


def _spread(seeds: npt.NDArray[np.uint64], columns: int) -> npt.NDArray[np.float32]:
    """[len(seeds), columns] multiples of 1/128 in [-1, 1): 8 significant bits, so that bfloat16 holds them."""
    factors = np.arange(1, columns + 1, dtype=np.uint64) * _ODD | np.uint64(1)
    mixed = (seeds[:, None] * factors[None, :]) >> np.uint64(56)
    return (mixed.astype(np.float32) - np.float32(128)) * np.float32(1 / 128)
