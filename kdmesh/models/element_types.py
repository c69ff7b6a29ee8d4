"""Which element type each tensor of a model has when the model is in one: routers often stay in float32."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel


def element_types(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of each floating-point tensor, as transformers loads it where `dtype` is asked for.

    Args:
        model: sharded or not; its own element type does not matter.
        names: of tensors, as in a state dict.
    """
    kept = model._get_dtype_plan(dtype)
    if not kept:
        return dict.fromkeys(names, dtype)
    pattern = re.compile("|".join(f"(?:{glob.replace('*', '.*')})" for glob in kept))
    return {name: torch.float32 if pattern.search(name) else dtype for name in names}
