"""What an engine must be able to do for its weights to be replaced."""

from __future__ import annotations

from typing import Protocol

from kdmesh.weights.manifest import TensorSpec


class WeightStaging(Protocol):
    """Takes what comes of one update at a time: `begin`, then `write`s, and `discard` where nothing comes of it.

    They are called from one thread, which is not the engine's; sampling goes on meanwhile, so they touch nothing that
    it uses.
    """

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the model, tied ones once; always the same."""
        ...

    def begin(self) -> None:
        """Make room for a second copy of all of them."""
        ...

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """Copy bytes to that room: the part of tensor_specs()[tensor] that begins at `offset_bytes`.

        Comes in order, each byte once. `data` is contiguous bytes, good only until this returns.
        """
        ...

    def discard(self) -> None:
        """Give the second copy up; what is served stays as it is."""
        ...


class WeightTarget(WeightStaging, Protocol):
    """The same with `commit`, in place of `discard`. Who calls it decides when, and in which thread."""

    def commit(self, version: int) -> None:
        """The second copy, which is complete, becomes what is served."""
        ...


class StagesInWeights:
    """The WeightStaging of an engine, by the one in its `_weights`."""

    _weights: WeightStaging

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """See WeightStaging."""
        return self._weights.tensor_specs()

    def begin(self) -> None:
        """See WeightStaging."""
        self._weights.begin()

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """See WeightStaging."""
        self._weights.write(tensor, offset_bytes, data)

    def discard(self) -> None:
        """See WeightStaging."""
        self._weights.discard()
