"""A model in this process whose weights are replaced while it serves."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.fingerprint import named_weights
from kdmesh.models.placement import DTYPES
from kdmesh.weights.manifest import TensorSpec
from kdmesh.weights.staging import StagedTensors


class ReplaceableWeights:
    """The WeightTarget of a Hugging Face model. The second copy lies in ordinary memory.

    Raises, when made:
        ConfigError: the model has a tensor of an element type that cannot be sent.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._own = named_weights(model)
        self._staged: StagedTensors | None = None
        for name, tensor in self._own.items():
            if tensor.dtype not in DTYPES:
                raise ConfigError(f"{model.name_or_path} has {name} of {tensor.dtype}, which cannot be replaced")
        self._specs = tuple(
            TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DTYPES[tensor.dtype])
            for name, tensor in self._own.items()
        )

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """See WeightTarget."""
        return self._specs

    def begin(self) -> None:
        """See WeightTarget."""
        self._staged = StagedTensors(self._specs)

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """See WeightTarget."""
        assert self._staged is not None
        self._staged.write(tensor, offset_bytes, data)

    def commit(self, version: int) -> None:
        """Copy the new values over the old ones; views of the parameters hold them then."""
        assert self._staged is not None
        with torch.no_grad():
            for name, tensor in self._staged.tensors.items():
                self._own[name].copy_(tensor)
        self._staged = None

    def discard(self) -> None:
        """See WeightTarget."""
        self._staged = None
