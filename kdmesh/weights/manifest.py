"""What an update of weights announces before any byte of it comes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from kdmesh.errors import InvalidRequest
from kdmesh.types import DType


class UpdatePolicy(StrEnum):
    """What becomes of samples that are being drawn when new weights are committed."""

    FINISH = "finish"  # they are finished on the old weights; new requests wait
    ABORT = "abort"  # they fail with Unavailable, for the client to ask again
    CONTINUE = "continue"  # they go on with the new weights, and report both versions


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a model, by its name in the Hugging Face state dict."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A version of the weights, and every tensor of it.

    Raises:
        InvalidRequest: there is no tensor, or one comes twice.
    """

    version: int
    architecture_fingerprint: str
    tensors: tuple[TensorSpec, ...]  # tied ones once, under one of their names
    policy: UpdatePolicy

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        if not names:
            raise InvalidRequest("an update without a tensor")
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InvalidRequest(f"an update names {', '.join(twice)} twice")
