"""Adds changes to a base, for a target that knows whole tensors only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdmesh.errors import InvalidRequest
from kdmesh.weights.finite import are_finite
from kdmesh.weights.manifest import AdapterSpec, LowRankSpec, TensorSpec
from kdmesh.weights.staging import StagedTensors
from kdmesh.weights.target import WeightTarget


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Base:
    """Weights that changes are added to, in ordinary memory."""

    name: bytes
    tensors: Mapping[str, Tensor]


class AddingUp:
    """One update: takes its bytes as a target does, and hands the sums over."""

    def __init__(
        self, target: WeightTarget, specs: Sequence[TensorSpec], adapter: AdapterSpec, *, base: Base | None
    ) -> None:
        """
        Args:
            target: gets the sums.
            specs: of what comes, in order.
            adapter: that fits the target's tensors.
            base: None when it comes too.
        """
        self._target = target
        self._specs = tuple(specs)
        self._changes: Mapping[str, LowRankSpec] = {change.tensor: change for change in adapter.changes}
        self._name = adapter.base
        self._base = base
        self._staged: StagedTensors
        self._has_handed_over = False

    @property
    def base(self) -> Base:
        """What the changes are added to; known when all of it has come."""
        if self._base is None:
            own = {spec.name for spec in self._target.tensor_specs()}
            tensors = {name: tensor for name, tensor in self._staged.tensors.items() if name in own}
            self._base = Base(name=self._name, tensors=tensors)
        return self._base

    def begin(self) -> None:
        """Make room for what comes."""
        self._staged = StagedTensors(self._specs)

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """Copy bytes to that room."""
        self._staged.write(tensor, offset_bytes, data)

    def hand_over(self) -> None:
        """Give the target every tensor; all of them have come. Takes long.

        Raises:
            InvalidRequest: a sum is not finite, though what was added is.
        """
        self._has_handed_over = True
        self._target.begin()
        for place, spec in enumerate(self._target.tensor_specs()):
            octets = self._sum(spec.name).reshape(-1).view(torch.uint8)
            if not are_finite(octets.numpy().data, spec.dtype):
                raise InvalidRequest(f"{spec.name} is not finite with what is added to it")
            if len(octets):
                self._target.write(place, 0, octets.numpy().data)

    def discard(self) -> None:
        """The target gives up what it was given, if anything."""
        if self._has_handed_over:
            self._target.discard()

    def _sum(self, name: str) -> Tensor:
        base = self.base.tensors[name]
        change = self._changes.get(name)
        if change is None:
            return base
        a, b = (self._staged.tensors[factor.name] for factor in change.factors(tuple(base.shape)))
        return torch.addmm(base.float(), b, a, alpha=change.scaling).to(base.dtype)
