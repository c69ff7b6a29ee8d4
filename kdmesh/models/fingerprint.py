"""Names for a model: for its architecture alone, or for its weights with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SAMPLED = 1024

# What differs between two loads of the same model.
_INCIDENTAL = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})

# What differs between models whose weights fit each other.
_NOT_ARCHITECTURE = _INCIDENTAL | {"bos_token_id", "eos_token_id", "pad_token_id"}


def model_fingerprint(model: PreTrainedModel, *read_by: str) -> str:
    """32 hexadecimal digits over the config, every tensor's name, shape and dtype, and a sample of its values.

    Neither the directory nor the device matters; the dtype of the loaded weights does. Reads at
    most 1024 values per tensor, evenly spread with both ends: it tells models and versions of one apart, and
    is no proof against a tensor changed on purpose.

    Args:
        read_by: fingerprints of what else decides what the model computes, as its image processor.
    """
    state = hashlib.blake2b(digest_size=16)
    config = {name: value for name, value in model.config.to_dict().items() if name not in _INCIDENTAL}
    state.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(_sample(tensor).numpy().tobytes())
    for other in read_by:
        state.update(other.encode())
    return state.hexdigest()


def architecture_fingerprint(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]] | None = None) -> str:
    """32 hexadecimal digits over what the config says of the architecture, and every weight's name and shape.

    Values and dtypes do not matter, nor whether the model is sharded: a trainer in float32 and a server in
    bfloat16 have the same.

    Args:
        shapes: of every weight, by name; None takes them from `model`.
    """
    if shapes is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in named_weights(model).items()}
    state = hashlib.blake2b(digest_size=16)
    state.update(json.dumps(_architecture(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, shape in sorted(shapes.items()):
        state.update(f"\n{name} {shape}".encode())
    return state.hexdigest()


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter and saved buffer by its name in the state dict; tied ones once, under the first name."""
    once: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        once.setdefault(id(tensor), name)
    return {name: tensors[name] for name in once.values()}


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """Without what does not matter, in sections too."""
    return {
        name: _architecture(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _NOT_ARCHITECTURE
    }


def _sample(tensor: Tensor) -> Tensor:
    """The sampled values' own bytes, [n * itemsize] uint8 on the CPU."""
    flat = tensor.detach().reshape(-1)
    count = min(len(flat), _SAMPLED)
    # Integer arithmetic: a float32 linspace cannot tell neighbours apart above 2^24.
    picks = torch.arange(count, device=flat.device) * max(len(flat) - 1, 0) // max(count - 1, 1)
    return flat[picks].cpu().view(torch.uint8)
