"""The weights of a model in SGLang, to be replaced while it serves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdmesh.errors import EngineFailure
from kdmesh.handles.slab.memory import Segment, create_segment
from kdmesh.models.element_types import element_types
from kdmesh.models.fingerprint import named_weights
from kdmesh.models.placement import DTYPES
from kdmesh.sglang.file_names import names_in_files
from kdmesh.sglang.runtime import SglangRuntime
from kdmesh.sglang.staged_weights import LOADER, StagedWeights, staged_bytes
from kdmesh.weights.manifest import TensorSpec


class SglangWeights:
    """The WeightTarget of one start of SGLang, whose `load` takes the place of `commit`."""

    def __init__(self, runtime: SglangRuntime) -> None:
        self._runtime = runtime
        skeleton = runtime.checkpoint.skeleton
        self._own = named_weights(skeleton)
        # As publishers send them; SGLang itself copies each into the type that it computes in.
        types = element_types(skeleton, self._own, getattr(torch, runtime.dtype.value))
        self._specs = tuple(
            TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DTYPES[types[name]])
            for name, tensor in self._own.items()
        )
        self._staged: StagedWeights | None = None
        self._segment: Segment | None = None  # that those lie in

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the model, tied ones once."""
        return self._specs

    def begin(self) -> None:
        """Make room for a second copy, in shared memory; the first time only, it is kept.

        Raises:
            ModelMismatch: SGLang loads such a model by other names.
            EngineFailure: there is no room.
        """
        if self._staged is None:
            names = names_in_files(self._own, self._runtime.checkpoint.shapes())
            specs = [replace(spec, name=names[spec.name]) for spec in self._specs]
            try:
                segment = create_segment(staged_bytes(specs), self._runtime.schedulers.readers_of_weights)
            except OSError as error:
                raise EngineFailure(f"there is no room for new weights: {error}") from error
            self._segment, self._staged = segment, StagedWeights(specs, segment)

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """Copy bytes to that room."""
        assert self._staged is not None
        self._staged.write(tensor, offset_bytes, data)

    def discard(self) -> None:
        """Nothing: the room is kept, and what lies there is written over."""

    async def load(self, version: int) -> None:
        """Let SGLang load the second copy, and forget the keys and values that it keeps."""
        from sglang.srt.managers.io_struct import (
            BeginWeightUpdateReqInput,
            EndWeightUpdateReqInput,
            UpdateWeightsFromTensorReqInput,
        )

        engine = self._runtime.engine
        manager = engine.tokenizer_manager
        _require(await manager.begin_weight_update(BeginWeightUpdateReqInput()))
        update = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=engine._serialize_tensors_per_rank([], LOADER),
            load_format=LOADER,
            flush_cache=True,
            weight_version=str(version),
        )
        _require(await manager.update_weights_from_tensor(update))
        _require(await manager.end_weight_update(EndWeightUpdateReqInput()))

    def loaded_bytes(self, parameter: Tensor) -> memoryview:
        """Of a parameter of the checkpoint's skeleton, what was loaded last; until the next update begins."""
        assert self._staged is not None
        (number,) = [number for number, tensor in enumerate(self._own.values()) if tensor is parameter]
        return self._staged.tensor_bytes(number)

    def close(self) -> None:
        """Give the room up, after SGLang has ended."""
        if self._segment is not None:
            self._segment.close()  # nobody can be shown it any more
            self._segment = self._staged = None


def _require(answer: tuple[bool, str]) -> None:
    is_done, message = answer
    if not is_done:
        raise EngineFailure(f"SGLang did not take new weights over: {message}")
