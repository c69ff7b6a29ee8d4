"""What an engine must be able to do for its weights to be replaced."""

from __future__ import annotations

from typing import Protocol

from kdmesh.weights.manifest import TensorSpec


class WeightTarget(Protocol):
    """Receives one update at a time: `begin`, then `write`s, then `commit` or `discard`.

    `begin`, `write` and `discard` are called from one thread, which is not the engine's; sampling goes on meanwhile,
    so they touch nothing that it uses. Who calls `commit` decides when, and in which thread.
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

    def commit(self, version: int) -> None:
        """The second copy, which is complete, becomes what is served."""
        ...

    def discard(self) -> None:
        """Give the second copy up; what is served stays as it is."""
        ...
