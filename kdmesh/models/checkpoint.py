"""A causal LM's directory, read without building the model: for engines that hold the weights themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.losses.head import OutputHead
from kdmesh.models.directory import check_model_directory
from kdmesh.models.head import output_head
from kdmesh.models.images.vision import auto_class

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SAMPLED_BYTES = 1024  # at each of three places of a tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """What a directory says of its model."""

    path: Path
    skeleton: PreTrainedModel  # without storage: shapes, names and constants
    dtype: torch.dtype  # that the configuration names

    @property
    def size_bytes(self) -> int:
        """Of the files with weights."""
        return sum(file.stat().st_size for file in _weight_files(self.path))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor in the files, by its name there."""
        return {name: stored.shape for name, stored in stored_tensors(self.path).items()}

    def output_head(self, dtype: torch.dtype) -> OutputHead:
        """The head's own tensors, read from the files, in `dtype`."""
        head = output_head(self.skeleton)
        linear = self.skeleton.get_output_embeddings()
        names = {id(tensor): name for name, tensor in self.skeleton.named_parameters(remove_duplicate=False)}
        weight_VD = self._tied_or_own(names[id(linear.weight)]).to(dtype)
        bias_V = None if linear.bias is None else read_tensor(self.path, names[id(linear.bias)]).to(dtype)
        return OutputHead(
            weight_VD=weight_VD, bias_V=bias_V, logit_scale=head.logit_scale, logit_softcap=head.logit_softcap
        )

    def fingerprint(self, *computed_as: str) -> str:
        """32 hexadecimal digits over the configuration, and each tensor's name, shape, dtype and a sample of its bytes.

        Args:
            computed_as: what else makes the numbers: dtype, quantization.
        """
        state = hashlib.blake2b(digest_size=16)
        state.update(json.dumps([*computed_as, self.skeleton.config.to_diff_dict()], default=str).encode())
        for file in _weight_files(self.path):
            with file.open("rb") as stream:
                for sample in _samples(stream):
                    state.update(sample)
        return state.hexdigest()

    def _tied_or_own(self, name: str) -> Tensor:
        if self.skeleton.config.get_text_config().tie_word_embeddings:
            embeddings = self.skeleton.get_input_embeddings()
            tied = [n for n, tensor in self.skeleton.named_parameters() if tensor is embeddings.weight]
            name = tied[0] if tied else name
        return read_tensor(self.path, self._name_in_files(name))

    def _name_in_files(self, name: str) -> str:
        """Files of models that read images may have older names, without the language model's own prefix."""
        names = self.shapes()
        older = [other for other in names if other.split(".")[-2:] == name.split(".")[-2:]]
        return older[0] if name not in names and len(older) == 1 else name


def open_checkpoint(path: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint in directory `path`; reads no weights.

    Raises:
        ConfigError: the directory is not a causal LM's.
    """
    if not trust_remote_code:
        check_model_directory(path, needs_weights=True)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            skeleton: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return Checkpoint(path=path, skeleton=skeleton, dtype=config.dtype or torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    is_float32: bool


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor in the files of directory `path`, by its name there; none where it has no weights."""
    if not any((path / name).is_file() for name in (_SINGLE, _INDEX)):
        return {}
    found: dict[str, StoredTensor] = {}
    for file in _weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                stored = tensors.get_slice(name)
                found[name] = StoredTensor(shape=tuple(stored.get_shape()), is_float32=stored.get_dtype() == "F32")
    return found


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of the checkpoint in directory `path`. Raises ConfigError when it has none of that name."""
    for file in _weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor: Tensor = tensors.get_tensor(name)
                return tensor
    raise ConfigError(f"{path} has no tensor {name}, which its output head needs")


def _samples(stream: BinaryIO) -> Iterator[bytes]:
    """Of a safetensors file: what its table says of each tensor, and bytes from its begin, middle and end."""
    table_bytes = int.from_bytes(stream.read(8), "little")
    table = json.loads(stream.read(table_bytes))
    table.pop("__metadata__", None)
    for name, entry in sorted(table.items()):
        yield json.dumps([name, entry["dtype"], entry["shape"]]).encode()
        begin, end = (8 + table_bytes + offset for offset in entry["data_offsets"])
        for place in (begin, (begin + end - _SAMPLED_BYTES) // 2, end - _SAMPLED_BYTES):
            stream.seek(max(place, begin))
            yield stream.read(min(_SAMPLED_BYTES, end - begin))


def _weight_files(path: Path) -> list[Path]:
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
    return [path / name for name in sorted(set(index["weight_map"].values()))]
