"""What an update of weights announces before any byte of it comes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from kdmesh.errors import InvalidRequest
from kdmesh.types import DType

BASE_BYTES = 16
"""Of the name of a base."""


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
class LowRankSpec:
    """A matrix to which scaling * b @ a is added.

    Raises:
        InvalidRequest: a number is out of range.
    """

    tensor: str
    rank: int
    scaling: float

    def __post_init__(self) -> None:
        if self.rank < 1 or not math.isfinite(self.scaling):
            raise InvalidRequest(
                f"the change of {self.tensor} has rank {self.rank} and scaling {self.scaling}; "
                "the rank must be above 0 and the scaling finite"
            )

    def factors(self, shape: tuple[int, ...]) -> tuple[TensorSpec, TensorSpec]:
        """a and b, for a matrix of this shape."""
        rows, columns = shape
        return (
            TensorSpec(name=f"{self.tensor}.a", shape=(self.rank, columns), dtype=DType.FLOAT32),
            TensorSpec(name=f"{self.tensor}.b", shape=(rows, self.rank), dtype=DType.FLOAT32),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """Changes to a model's weights that are kept apart from them.

    Raises:
        InvalidRequest: it changes nothing, or a matrix twice, or its base has no name.
    """

    base: bytes  # names the weights that are changed
    changes: tuple[LowRankSpec, ...]

    def __post_init__(self) -> None:
        if len(self.base) != BASE_BYTES:
            raise InvalidRequest(f"a base with a name of {len(self.base)} bytes; it must have {BASE_BYTES}")
        names = {change.tensor for change in self.changes}
        if not names or len(names) < len(self.changes):
            raise InvalidRequest(f"an adapter of {len(self.changes)} changes to {len(names)} tensors; each once, some")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A version of the weights, and every tensor of it that comes.

    Raises:
        InvalidRequest: there is no tensor, or one comes twice.
    """

    version: int
    architecture_fingerprint: str
    tensors: tuple[TensorSpec, ...]  # tied ones once, under one of their names
    policy: UpdatePolicy
    adapter: AdapterSpec | None = None
    job: str = ""  # whose weights they are; empty: unnamed

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        if not names:
            raise InvalidRequest("an update without a tensor")
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InvalidRequest(f"an update names {', '.join(twice)} twice")
