"""An engine without a model, whose samples can be predicted from prompt, seed and weights."""

from __future__ import annotations

import hashlib
import secrets
import time
import zlib
from collections.abc import Sequence, Set

import torch

from kdmesh.sampling.growing import GrowingSample
from kdmesh.sampling.stops import StopStrings
from kdmesh.types import DType, Int32Array, SleepTag
from kdmesh.weights.manifest import TensorSpec
from kdmesh.weights.staging import StagedTensors
from kdmesh_rollout.config import FakeEngine as FakeEngineConfig
from kdmesh_rollout.engine import EngineDescription, Finished, Order

_COLUMNS = 8

START_SALT = 0
"""What stands for the weights that a fake engine starts with."""


class FakeEngine:
    """Token i is a hash of the prompt, the seed, the place i and the bytes of the weights it was drawn with."""

    def __init__(self, config: FakeEngineConfig) -> None:
        self._config = config
        self._salt = START_SALT
        self._version = 0
        self._running: dict[int, tuple[Order, int, GrowingSample]] = {}
        self._staged: StagedTensors | None = None
        self._drawn_tokens = self._prefilled_tokens = 0

    def load(self) -> EngineDescription:
        """Describe the made-up model."""
        config = self._config
        return EngineDescription(
            name="fake",
            architecture_fingerprint=f"fa4e{config.vocabulary_size:08x}{config.dtype}",
            tokenizer_fingerprint=f"fa4e{config.vocabulary_size:08x}",
            vocabulary_size=config.vocabulary_size,
            dtype=DType(config.dtype),
            max_sequence_tokens=config.max_sequence_tokens,
            max_running=config.max_running,
            is_deterministic=True,
        )

    def add(self, order: Order) -> None:
        """Begin a sample with the next step."""
        stops = StopStrings(order.sampling.stop_strings, text_of)
        seed = secrets.randbits(64) if order.seed is None else order.seed
        sample = GrowingSample(
            order.key,
            order.prompt_ids,
            sampling=order.sampling,
            seed=seed,
            max_sequence_tokens=self._config.max_sequence_tokens,
            stops=stops,
        )
        self._running[order.key] = (order, seed, sample)
        self._prefilled_tokens += len(order.prompt_ids)

    def abort(self, key: int) -> None:
        """Forget a sample."""
        self._running.pop(key, None)

    def step(self) -> list[Finished]:
        """Draw one token for everything under way; takes the configured time."""
        time.sleep(self._config.seconds_per_step)
        finished = []
        for order, seed, sample in tuple(self._running.values()):
            place = sample.num_drawn
            token, logprob = token_at(
                order.prompt_ids, seed, place, salt=self._salt, vocabulary_size=self._config.vocabulary_size
            )
            self._drawn_tokens += 1
            outcome = sample.take(token, logprob, version=self._version)
            if outcome is not None:
                del self._running[order.key]
                finished.append(Finished(key=order.key, sample=outcome))
        return finished

    def interrupt(self) -> None:
        """Nothing: a step does not wait."""

    @property
    def num_running(self) -> int:
        """Samples under way."""
        return len(self._running)

    @property
    def num_drawn_tokens(self) -> int:
        """Tokens drawn since the start."""
        return self._drawn_tokens

    @property
    def num_prefilled_tokens(self) -> int:
        """Prompt tokens since the start."""
        return self._prefilled_tokens

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """Two tensors of the made-up model."""
        dtype = DType(self._config.dtype)
        return (
            TensorSpec(name="embed.weight", shape=(self._config.vocabulary_size, _COLUMNS), dtype=dtype),
            TensorSpec(name="norm.weight", shape=(_COLUMNS,), dtype=dtype),
        )

    def begin(self) -> None:
        """Make room for new ones."""
        self._staged = StagedTensors(self.tensor_specs())

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """Copy bytes to that room."""
        assert self._staged is not None
        self._staged.write(tensor, offset_bytes, data)

    def commit(self, version: int) -> None:
        """Draw with the new weights from now on."""
        assert self._staged is not None
        parts = [tensor.view(torch.uint8).numpy().tobytes() for tensor in self._staged.tensors.values()]
        self._salt = salt_of(parts)
        self._version = version
        self._staged = None

    def discard(self) -> None:
        """Forget the new ones."""
        self._staged = None

    @property
    def sleep_refusal(self) -> str:
        """It can sleep."""
        return ""

    def sleep(self, tags: Set[SleepTag]) -> None:
        """It holds nothing to give back."""

    def wake(self, tags: Set[SleepTag]) -> None:
        """Nothing to take."""


def token_at(prompt_ids: Int32Array, seed: int, place: int, *, salt: int, vocabulary_size: int) -> tuple[int, float]:
    """The token that the fake engine draws there, and its log-probability, which float32 holds exactly."""
    state = hashlib.blake2b(prompt_ids.astype("<i4").tobytes(), digest_size=16)
    state.update(b"%d %d %d" % (seed, place, salt))
    drawn = state.digest()
    return int.from_bytes(drawn[:8], "little") % vocabulary_size, -(1 + drawn[8]) / 256


def salt_of(tensors: Sequence[bytes]) -> int:
    """What stands for weights of these bytes."""
    return zlib.crc32(b"".join(tensors))


def text_of(token_ids: Sequence[int]) -> str:
    """The made-up tokenizer's text."""
    return "".join(f"<{token}>" for token in token_ids)
