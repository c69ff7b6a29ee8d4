"""Which element type each tensor of a model has when the model is in one: routers often stay in float32."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kdmesh.models.images.vision import auto_class


def element_types(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of each floating-point tensor, as transformers loads it where `dtype` is asked for.

    Args:
        model: sharded or not; its own element type does not matter.
        names: of tensors, as in a state dict.
    """
    own = _of_their_own(model.config, dtype)
    kept = model._get_dtype_plan(dtype)
    pattern = re.compile("|".join(f"(?:{glob.replace('*', '.*')})" for glob in kept))
    return {name: torch.float32 if kept and pattern.search(name) else own.get(name, dtype) for name in names}


def parameters_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[nn.Parameter]:
    """Those that transformers keeps in float32 where `dtype` is asked for.

    Args:
        model: as for element_types.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    types = element_types(model, named, dtype)
    return {parameter for name, parameter in named.items() if parameter.is_floating_point() and types[name] != dtype}


def _of_their_own(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of the tensors that the model's code makes in another type than is asked for, as decays of linear attention."""
    told = copy.deepcopy(config)  # which transformers writes the type into
    if hasattr(told, "quantization_config"):
        del told.quantization_config
    with torch.device("meta"):
        made = auto_class(told).from_config(told, dtype=dtype, trust_remote_code=False)
    return {
        name: tensor.dtype
        for name, tensor in made.state_dict().items()
        if tensor.is_floating_point() and tensor.dtype != dtype
    }
