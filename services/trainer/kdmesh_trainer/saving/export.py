"""The trained model as a directory that `from_pretrained` loads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdmesh.errors import CheckpointError
from kdmesh.models.checkpoint import stored_tensors
from kdmesh.models.element_types import element_types
from kdmesh.models.images.vision import auto_class
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.saving.files import replacing
from kdmesh_trainer.student.model import Student, release

if TYPE_CHECKING:
    from kdmesh_trainer.saving.compressed import CompressedMatrices
    from kdmesh_trainer.sections.export_config import Matrices  # which needs pydantic

log = logging.getLogger(__name__)

_MASTERS = "masters"  # inside of a directory with rounded matrices
_GENERATION = "generation_config.json"
# Files beside a model that training does not change, but for what ends a turn.
_COPIED = (
    _GENERATION,
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
_DERIVED = {"nemotron_h": ("hybrid_override_pattern", "num_hidden_layers")}
"""Model type -> what transformers 5.24 derives from other keys and writes no more; SGLang and vLLM read it."""


class HuggingFaceExporter:
    """Writes the student with its tokenizer, in the element type of the checkpoint it started from, or another.

    What transformers keeps in float32 beside that, as routers of mixtures, is written in float32, and so is what those
    files have in it. Matrices that the student rounds are written as such. An adapter is added to the matrices that it
    belongs to. Where generation ends is what the student started with, and the end of a turn that it has learnt.
    """

    def __init__(
        self,
        path: Path,
        student: Student,
        *,
        origin: Path,
        tokenizer: PreTrainedTokenizerBase,
        mesh: Mesh,
        end_of_turn: int | None = None,
        dtype: torch.dtype | None = None,
        matrices: Matrices = "rounded",
    ) -> None:
        """
        Args:
            path: the directory to write; an older one is replaced when the new one is complete.
            origin: directory of the model the student started from.
            tokenizer: with the chat template that was trained with.
            end_of_turn: the token that ends an assistant turn in that template; None where none does.
            dtype: element type of what is written; None: that of the files in `origin`.
            matrices: what to write of those that the student rounds, if it rounds some.
        """
        self._path = path
        self._student = student
        self._origin = origin
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._end_of_turn = end_of_turn
        self._dtype = dtype
        self._matrices = matrices
        self._stored = stored_tensors(origin)

    def export(self) -> None:
        """As `write`, to the exporter's own directory."""
        self.write(self._path, notes={})

    def write(self, path: Path, *, notes: Mapping[str, Mapping[str, object]]) -> None:
        """Write the student as it is now. Collective; the first rank holds the whole model meanwhile.

        Args:
            path: the directory to write; an older one is replaced when the new one is complete.
            notes: what to write beside it, by the name of a JSON file.

        Raises:
            CheckpointError: it could not be written; an older one is untouched.
        """
        config = AutoConfig.from_pretrained(self._origin, local_files_only=True, trust_remote_code=False)
        dtype = self._dtype or config.dtype or torch.float32
        tensors = self._whole_tensors(dtype)
        rounded = None if self._matrices == "masters" else self._rounded_matrices(dtype)
        self._mesh.on_first(lambda: self._write(path, config, tensors, rounded, notes))

    def _whole_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor by its name in the model, on the first rank; one at a time is whole on the others.

        Of a matrix that the student rounds it is the master.
        """
        release(self._student)
        whole: dict[int, Tensor] = {}  # shared weights once
        named: dict[str, Tensor] = {}
        weights = self._student.weights()
        types = element_types(self._student.lm, weights, dtype)
        if self._dtype is None:
            types |= {name: torch.float32 for name, stored in self._stored.items() if stored.is_float32}
        for name, weight in weights.items():
            if id(weight) not in whole:
                tensor = weight.master().whole(types[name] if weight.is_floating_point else None).to("cpu")
                whole[id(weight)] = tensor if self._mesh.is_first else tensor.new_empty(0)
            named[name] = whole[id(weight)]
        return named

    def _rounded_matrices(self, dtype: torch.dtype) -> CompressedMatrices | None:
        """Those that the student rounds, on the first rank; None: it rounds none."""
        weights = {name: weight for name, weight in self._student.weights().items() if weight.rounding is not None}
        if not weights:
            return None
        from kdmesh_trainer.saving.compressed import CompressedMatrices  # not at the top: it needs an extra

        rounding = next(iter(weights.values())).rounding
        assert rounding is not None  # the same of all
        found = CompressedMatrices(rounding, dtype)
        for name, weight in weights.items():
            master = weight.master().whole(rounding.compute_dtype).to("cpu")
            if self._mesh.is_first:
                found.add(name, master)
        return found

    def _write(
        self,
        path: Path,
        config: PretrainedConfig,
        tensors: dict[str, Tensor],
        rounded: CompressedMatrices | None,
        notes: Mapping[str, Mapping[str, object]],
    ) -> None:
        try:
            with replacing(path) as writing:
                self._fill(writing, config, tensors, rounded)
                if rounded is not None and self._matrices == "both":
                    self._fill(writing / _MASTERS, config, tensors, None)
                for name, note in notes.items():
                    (writing / name).write_text(json.dumps(note) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the trained model was not written to {path}: {error}") from error
        log.info("trained model written", extra={"path": str(path)})

    def _fill(
        self, path: Path, config: PretrainedConfig, tensors: dict[str, Tensor], rounded: CompressedMatrices | None
    ) -> None:
        """Make the directory `path`, with `rounded` in the place of their masters."""
        model = _whole_model(config, tensors)
        if rounded is None:
            model.save_pretrained(path, save_original_format=not self._are_named_as_stored(tensors))
        else:
            model.config.quantization_config = rounded.described(model)
            # They are named as stored, or the student would have been refused.
            model.save_pretrained(path, state_dict=rounded.in_place_of_masters(tensors), save_original_format=False)
        _add_derived(config, path / "config.json")
        _save_tokenizer(self._tokenizer, path)
        for name in _COPIED:
            if (self._origin / name).is_file():
                shutil.copyfile(self._origin / name, path / name)
        if self._end_of_turn is not None:
            _end_at(self._end_of_turn, path / _GENERATION)

    def _are_named_as_stored(self, tensors: dict[str, Tensor]) -> bool:
        """Whether files of `origin` hold tensors as the model does: transformers would write experts one by one."""
        once: dict[int, str] = {}
        for name, tensor in tensors.items():
            once.setdefault(id(tensor), name)
        stored = {name: tensor.shape for name, tensor in self._stored.items()}
        return all(stored.get(name) == tuple(tensors[name].shape) for name in once.values())


def _whole_model(config: PretrainedConfig, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """A model that holds `tensors` and nothing else, with a configuration that says so."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what was quantized was loaded as plain numbers, and is written as such
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=False)
    model.load_state_dict(tensors, assign=True)
    if _has_own_head(model):
        # The files hold a head of its own, whatever the configuration says; tie_weights would put the embedding there.
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
    model.tie_weights()
    return model


def _add_derived(config: PretrainedConfig, path: Path) -> None:
    derived = {name: getattr(config, name) for name in _DERIVED.get(config.model_type, ())}
    if derived:
        said = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(said | derived, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    try:
        tokenizer.save_pretrained(path)
    except Exception as error:  # tokenizers has no narrower one for a file that cannot be written
        raise OSError(str(error)) from error


def _end_at(token: int, path: Path) -> None:
    """Have engines end a response there too: a base model names only what ends a text."""
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = said.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if token not in ends:
        path.write_text(json.dumps(said | {"eos_token_id": [*ends, token]}, indent=2) + "\n", encoding="utf-8")


def _has_own_head(model: PreTrainedModel) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return bool(head.weight.data_ptr() != embeddings.weight.data_ptr())
