"""Tensors by the names that a model's files give them, which are those that SGLang loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from kdmesh.errors import ModelMismatch

# transformers holds the experts of a layer in two tensors; files have three for each expert.
_GATE_UP = ".experts.gate_up_proj"  # [experts, gate rows and then up rows, columns]
_DOWN = ".experts.down_proj"


def file_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What files hold in place of one tensor of transformers' state dict; views of it."""
    if name.endswith(_GATE_UP):
        stem = name.removesuffix("gate_up_proj")
        for expert, gate_up in enumerate(tensor):
            gate, up = gate_up.chunk(2)
            yield f"{stem}{expert}.gate_proj.weight", gate
            yield f"{stem}{expert}.up_proj.weight", up
    elif name.endswith(_DOWN):
        stem = name.removesuffix("down_proj")
        for expert, down in enumerate(tensor):
            yield f"{stem}{expert}.down_proj.weight", down
    else:
        yield name, tensor


def check_names(tensors: Mapping[str, Tensor], in_files: Mapping[str, Sequence[int]]) -> None:
    """Raises ModelMismatch when the files hold a model's tensors by other names or in other shapes than is known here.

    Args:
        tensors: of the model; on any device.
        in_files: shape of each tensor by its name.
    """
    own = {own: tuple(part.shape) for name, tensor in tensors.items() for own, part in file_tensors(name, tensor)}
    strange = sorted(name for name, shape in own.items() if tuple(in_files.get(name, ())) != shape)
    if strange:
        raise ModelMismatch(
            f"weights of this architecture cannot be replaced in SGLang: its files hold {', '.join(strange[:3])} "
            f"({len(strange)} in all) by other names, or in other shapes"
        )
