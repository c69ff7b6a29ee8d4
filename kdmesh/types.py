"""Values that cross module boundaries, and the legend of tensor shape suffixes.

Shape suffixes, on tensor and array names where maths happens:
B sequences, T packed tokens, R loss positions (rows), V vocabulary, D hidden size, C rows of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from kdmesh.errors import InvalidRequest

Int32Array = npt.NDArray[np.int32]


class DType(StrEnum):
    """Element type of a matrix that crosses a service boundary; named as torch names it."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def size_bytes(self) -> int:
        """Bytes of one element."""
        return 4 if self is DType.FLOAT32 else 2


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

    def __post_init__(self) -> None:
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
