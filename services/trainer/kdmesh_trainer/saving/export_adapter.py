"""The trained adapter as a directory that peft loads on top of the model it was trained with."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kdmesh.errors import CheckpointError
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.saving.files import replacing
from kdmesh_trainer.student.lora import Adapter
from kdmesh_trainer.student.model import Student, release
from kdmesh_trainer.student.weights import whole

log = logging.getLogger(__name__)

_WEIGHTS = "adapter_model.safetensors"


class AdapterExporter:
    """Writes the student's adapter alone, in the element type that it is trained in."""

    def __init__(self, path: Path, student: Student, adapter: Adapter, *, origin: Path, mesh: Mesh) -> None:
        """
        Args:
            path: the directory to write; an older one is replaced when the new one is complete.
            adapter: the student's.
            origin: directory of the model the student started from.
        """
        self._path = path
        self._student = student
        self._adapter = adapter
        self._origin = origin
        self._mesh = mesh

    def export(self) -> None:
        """Write the adapter as it is now. Collective; every rank holds all of it meanwhile.

        Raises:
            CheckpointError: it could not be written; an older one is untouched.
        """
        release(self._student)
        tensors = {}
        for name, tensor in self._student.lm.state_dict(keep_vars=True).items():
            saved_name = self._adapter.saved_name(name)
            if saved_name is not None:
                tensors[saved_name] = whole(tensor, None).to("cpu").contiguous()
        self._mesh.on_first(lambda: self._write(tensors))

    def _write(self, tensors: dict[str, Tensor]) -> None:
        config = dataclasses.replace(
            self._adapter.config, inference_mode=True, base_model_name_or_path=str(self._origin)
        )
        try:
            with replacing(self._path) as writing:
                writing.mkdir()
                save_file(tensors, writing / _WEIGHTS, metadata={"format": "pt"})
                config.save_pretrained(str(writing))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the trained adapter was not written to {self._path}: {error}") from error
        log.info("trained adapter written", extra={"path": str(self._path)})
