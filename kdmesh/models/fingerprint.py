"""A name for a model's weights together with its architecture."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SAMPLED = 1024

# What differs between two loads of the same model.
_INCIDENTAL = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


def model_fingerprint(model: PreTrainedModel) -> str:
    """32 hexadecimal digits over the config, every tensor's name, shape and dtype, and a sample of its values.

    Neither the directory nor the device matters; the dtype of the loaded weights does. Reads at
    most 1024 values per tensor, evenly spread with both ends: it tells models and versions of one apart, and
    is no proof against a tensor changed on purpose.
    """
    state = hashlib.blake2b(digest_size=16)
    config = {name: value for name, value in model.config.to_dict().items() if name not in _INCIDENTAL}
    state.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(_sample(tensor).numpy().tobytes())
    return state.hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    """The sampled values' own bytes, [n * itemsize] uint8 on the CPU."""
    flat = tensor.detach().reshape(-1)
    count = min(len(flat), _SAMPLED)
    # Integer arithmetic: a float32 linspace cannot tell neighbours apart above 2^24.
    picks = torch.arange(count, device=flat.device) * max(len(flat) - 1, 0) // max(count - 1, 1)
    return flat[picks].cpu().view(torch.uint8)
