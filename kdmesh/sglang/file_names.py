"""Tensors by the names that a model's files give them, which are those that SGLang loads."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

from torch import Tensor

from kdmesh.errors import ModelMismatch

# transformers holds the experts of a layer in two tensors; files have three for each expert.
_GATE_UP = ".experts.gate_up_proj"  # [experts, gate rows and then up rows, columns]
_DOWN = ".experts.down_proj"
_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
# Mixtral's files, and MiniMax's, call a layer's mixture otherwise, and what is in it.
_MIXTURE, _MIXTRAL = ".mlp.", ".block_sparse_moe."
_MIXTRAL_GATE_UP_DOWN = ("w1", "w3", "w2")
# Files of models that read images may have older names, without transformers' own prefixes.
_OLDER = (("model.language_model.", "model."), ("model.visual.", "visual."))


def file_tensors(name: str, tensor: Tensor, others: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """What files hold in place of one tensor of transformers' state dict, named as they begin it; views of it.

    Args:
        others: names of all tensors of the model. Experts that have biases, as gpt-oss's, are one tensor in files too.
    """
    if f"{name}_bias" in others:
        yield name, tensor
        return
    gate_name, up_name, down_name = _MIXTRAL_GATE_UP_DOWN if _MIXTRAL in name else _GATE_UP_DOWN
    if name.endswith(_GATE_UP):
        stem = name.removesuffix("gate_up_proj")
        for expert, gate_up in enumerate(tensor):
            gate, up = gate_up.chunk(2)
            yield f"{stem}{expert}.{gate_name}.weight", gate
            yield f"{stem}{expert}.{up_name}.weight", up
    elif name.endswith(_DOWN):
        stem = name.removesuffix("down_proj")
        for expert, down in enumerate(tensor):
            yield f"{stem}{expert}.{down_name}.weight", down
    else:
        yield name, tensor


def names_in_files(tensors: Mapping[str, Tensor], in_files: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """By the name of each of a model's tensors the one that the files have for it or its parts, for `file_tensors`.

    Args:
        tensors: of the model; on any device.
        in_files: shape of each tensor by its name.

    Raises:
        ModelMismatch: the files hold a tensor by another name or in another shape than is known here.
    """
    found = {name: _name_in_files(name, tensors, in_files) for name in tensors}
    strange = sorted(
        own for name, known in found.items() if known is None for own, _ in file_tensors(name, tensors[name], tensors)
    )
    if strange:
        raise ModelMismatch(
            f"weights of this architecture cannot be replaced in SGLang: its files hold {', '.join(strange[:3])} "
            f"({len(strange)} in all) by other names, or in other shapes"
        )
    return {name: known for name, known in found.items() if known is not None}


def _name_in_files(name: str, tensors: Mapping[str, Tensor], in_files: Mapping[str, Sequence[int]]) -> str | None:
    tensor = tensors[name]
    older = [old + name.removeprefix(new) for new, old in _OLDER if name.startswith(new)]
    for known in (name, *older, name.replace(_MIXTURE, _MIXTRAL)):
        # Newer files, as Qwen3.5's, hold experts as transformers does; SGLang loads those by either names.
        if tuple(in_files.get(known, ())) == tuple(tensor.shape):
            return known
        if all(tuple(in_files.get(own, ())) == tuple(part.shape) for own, part in file_tensors(known, tensor, tensors)):
            return known
    return None
