"""The same model in Hugging Face transformers, to compare SGLang with."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.handles.slab.memory import require_available
from kdmesh.models.body import load_causal_lm
from kdmesh.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

# Weights are read a file at a time, beside the model being filled.
_ROOM = 1.25


def transformers_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel | None:
    """On the CPU; None, and a warning, where it does not fit in memory or transformers does not know it."""
    try:
        require_available(int(checkpoint.size_bytes * dtype.itemsize / checkpoint.dtype.itemsize * _ROOM))
        return load_causal_lm(checkpoint.path, dtype, torch.device("cpu"))
    except (OSError, ConfigError) as error:
        log.warning("not compared with transformers", extra={"reason": str(error)})
        return None
