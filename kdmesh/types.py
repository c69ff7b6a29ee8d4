"""Values that cross module boundaries, and the legend of tensor shape suffixes.

Shape suffixes, on tensor and array names where maths happens:
B sequences, T packed tokens, R loss positions (rows), V vocabulary, D hidden size, E hidden size of the teacher where
it is another, C rows of one chunk, or chunks of text that two tokenizers share. Others are said where they begin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdmesh.errors import InvalidRequest

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


class DType(StrEnum):
    """Element type of a matrix that crosses a service boundary; named as torch names it."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def size_bytes(self) -> int:
        """Bytes of one element."""
        return 4 if self is DType.FLOAT32 else 2


class SleepTag(StrEnum):
    """What a server can give back to its device for a while; see common.proto."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"


EVERY_TAG = frozenset(SleepTag)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """What a server says of how much it has to do."""

    waiting_tokens: int  # of all clients, with those that are computed now
    tokens_per_s: float | None  # measured; None before anything was
    recent_tokens: float = 0.0  # that came lately, older ones counting less


IMAGE_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Image:
    """An encoded image (PNG, JPEG or WebP), named by its content."""

    digest: bytes  # BLAKE2b of the encoded bytes, IMAGE_DIGEST_BYTES long
    data: bytes | Path  # the encoded bytes, or the file that holds them
    size_bytes: int  # of the encoded bytes
    width: int  # pixels
    height: int  # pixels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedImage:
    """An image of a sequence, and the tokens that stand for it there.

    Raises:
        InvalidRequest: when a field does not have the form stated here.
    """

    digest: bytes  # of the image
    first_token: int  # index in the sequence
    num_tokens: int  # >= 1; the model's image tokens, with the tokens that it writes around and between them
    image: Image | None  # None: whoever has it must be asked by its digest

    def __post_init__(self) -> None:
        if len(self.digest) != IMAGE_DIGEST_BYTES:
            raise InvalidRequest(f"an image's digest has {len(self.digest)} bytes; it must have {IMAGE_DIGEST_BYTES}")
        if self.first_token < 0 or self.num_tokens < 1:
            raise InvalidRequest(
                f"an image stands at token {self.first_token} for {self.num_tokens} tokens; it needs at least one"
            )

    @property
    def end(self) -> int:
        """One past its last token."""
        return self.first_token + self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSequence:
    """One sequence under one tokenizer, and the positions that carry loss.

    Position p is the hidden state that predicts token p + 1, so the last token
    is never a position.

    Raises:
        InvalidRequest: when the arrays do not have the form stated here.
    """

    token_ids: Int32Array  # [T], each >= 0, T >= 2
    positions: Int32Array  # [R], strictly increasing, 0 <= each <= T - 2, R >= 1
    images: tuple[PlacedImage, ...] = ()  # in the order of their tokens, which no two share
    weight: float = 1.0  # of each position's loss, finite, > 0; nobody but who trains is told

    def __post_init__(self) -> None:
        self._check_images()
        if not 0 < self.weight < math.inf:
            raise InvalidRequest(f"a sequence has weight {self.weight}; it must be positive and finite")
        tokens, positions = self.token_ids, self.positions
        if tokens.ndim != 1 or len(tokens) < 2:
            raise InvalidRequest(f"a sequence has shape {tokens.shape}; it needs one axis and at least 2 tokens")
        if tokens.min() < 0:
            raise InvalidRequest(f"token id {tokens.min()} is negative")
        if positions.ndim != 1 or len(positions) == 0:
            raise InvalidRequest("a sequence asks for no position; leave it out instead")
        if (np.diff(positions) <= 0).any():
            raise InvalidRequest("positions are not strictly increasing")
        if positions[0] < 0 or positions[-1] > len(tokens) - 2:
            raise InvalidRequest(
                f"position {positions[0] if positions[0] < 0 else positions[-1]} is out of range: a sequence of "
                f"{len(tokens)} tokens has the positions 0 to {len(tokens) - 2}"
            )

    def _check_images(self) -> None:
        end = 0
        for image in self.images:
            if image.first_token < end or image.end > len(self.token_ids):
                raise InvalidRequest(
                    f"an image stands for tokens {image.first_token} to {image.end - 1} of a sequence of "
                    f"{len(self.token_ids)}; images must be in order, share no token, and be inside it"
                )
            end = image.end

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.positions)

    @property
    def labels(self) -> Int32Array:
        """[R] the token that each position predicts."""
        labels: Int32Array = self.token_ids[self.positions + 1]
        return labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """A capability to read one row-major matrix in a server's shared memory; see common.proto."""

    segment: int
    epoch: int
    token: bytes  # 16 bytes
    offset_bytes: int
    rows: int
    cols: int
    dtype: DType
    is_claimed: bool = False  # by the connection to the broker of whoever was answered

    @property
    def size_bytes(self) -> int:
        """Bytes of the matrix."""
        return self.rows * self.cols * self.dtype.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """How logits follow from a final hidden state h: z = scale * (W h + b), then cap * tanh(z / cap)."""

    logit_scale: float
    logit_softcap: float | None
    vocabulary_size: int  # real tokens; higher rows of W are padding
    padded_vocabulary_size: int  # rows of W
    has_bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSpec:
    """How a model reads images; see common.proto."""

    image_token_id: int
    expansion: str  # names how an image's size becomes a number of tokens
    max_image_bytes: int  # encoded
    max_image_pixels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """The model behind a teacher server, and what one request may ask of it; see teacher.proto."""

    name: str
    model_fingerprint: str
    tokenizer_fingerprint: str  # empty: the model has no tokenizer
    hidden_size: int
    dtype: DType
    head: HeadSpec
    weight_version: int
    max_sequence_tokens: int
    max_request_tokens: int
    max_request_rows: int
    is_deterministic: bool
    architecture_fingerprint: str = ""  # empty: its weights are frozen
    vision: VisionSpec | None = None  # None: it reads no images
    num_layers: int = 0  # whose outputs can be asked for, numbered from 1; 0: only final hidden states can be

    def num_columns(self, layers: Sequence[int]) -> int:
        """Of a row that has the outputs of these layers behind the final hidden state."""
        return self.hidden_size * (1 + len(layers))

    def for_layers(self, layers: Sequence[int]) -> ModelDescription:
        """The same model with the limits of requests for the outputs of these layers."""
        return replace(self, max_request_rows=self.max_request_rows // (1 + len(layers)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAnswer:
    """What a teacher server has kept of some sequences, and could keep; see teacher.proto."""

    is_kept: tuple[bool, ...]
    budget_bytes: int  # 0: it keeps nothing
    entry_bytes: int  # of the budget, that a sequence takes beyond its rows
    tokens_per_s: float | None  # None: it has measured nothing yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens of a response are drawn, and what ends it; see rollout.proto.

    Applied in this order: repetition penalty, temperature, top_k, top_p, min_p.

    Raises:
        InvalidRequest: a parameter is out of its range.
    """

    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0 draws from all tokens
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InvalidRequest(f"temperature is {self.temperature}; it must be 0 or more, and finite")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k is {self.top_k}; it must be 0, for all tokens, or more")
        if not 0 <= self.min_p <= 1:
            raise InvalidRequest(f"min_p is {self.min_p}; it must be from 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise InvalidRequest(f"repetition_penalty is {self.repetition_penalty}; it must be above 0, and finite")
        if self.max_new_tokens < 1:
            raise InvalidRequest(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if any(token < 0 for token in self.stop_token_ids):
            raise InvalidRequest(f"stop_token_ids holds {min(self.stop_token_ids)}; a token id is 0 or more")
        if not all(self.stop_strings):
            raise InvalidRequest("stop_strings holds an empty text, which would end every response at once")


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"  # a stop token, which is its last token, or a stop string
    LENGTH = "length"  # max_new_tokens or the model's limit; nothing was appended


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One finished response, without its prompt.

    Raises:
        InvalidRequest: when the arrays or the versions do not have the form stated here.
    """

    token_ids: Int32Array  # [N], each >= 0, N >= 1
    logprobs: Float32Array  # [N] of each token at temperature 1, before truncation or penalty; each <= 0
    finish_reason: FinishReason
    min_weight_version: int  # of the first token
    max_weight_version: int  # of the last token

    def __post_init__(self) -> None:
        tokens, logprobs = self.token_ids, self.logprobs
        if tokens.ndim != 1 or len(tokens) == 0:
            raise InvalidRequest(f"a sample has shape {tokens.shape}; it needs one axis and at least 1 token")
        if tokens.min() < 0:
            raise InvalidRequest(f"token id {tokens.min()} is negative")
        if logprobs.shape != tokens.shape:
            raise InvalidRequest(f"a sample of {len(tokens)} tokens has log-probabilities of shape {logprobs.shape}")
        if not (logprobs <= 0).all():
            wrong = logprobs[~(logprobs <= 0)][0]
            raise InvalidRequest(f"a log-probability is {wrong}; it must be at most 0, and a number")
        if not 0 <= self.min_weight_version <= self.max_weight_version:
            raise InvalidRequest(
                f"a sample with weight versions {self.min_weight_version} to {self.max_weight_version}; "
                "they must not fall"
            )

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutDescription:
    """The model behind a rollout server, and what one request may ask of it; see rollout.proto."""

    name: str
    architecture_fingerprint: str
    tokenizer_fingerprint: str  # empty: the model has no tokenizer
    vocabulary_size: int  # real tokens; an id at or above it is neither accepted nor drawn
    weight_version: int  # 0: those the server was started with
    max_sequence_tokens: int  # of prompt and response together
    is_deterministic: bool
    dtype: DType  # of the weights, also on the wire
    vision: VisionSpec | None = None  # None: it reads no images
