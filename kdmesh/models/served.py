"""Loads the model that an engine of transformers serves."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh.models.images.reader import ImageReader, load_image_reader
from kdmesh.models.placement import DTYPES, device, torch_dtype
from kdmesh.models.verify import check_images
from kdmesh.processor import warn_if_slow


def load_served(
    path: Path, *, dtype: str, on: Literal["auto", "cpu", "cuda"], threads: int | None
) -> tuple[PreTrainedModel, ImageReader | None]:
    """The causal LM in directory `path`, and its reader of images; None when it reads text alone.

    Args:
        dtype: `engine.dtype`.
        on: `engine.device`.
        threads: torch's, for the whole process; None leaves them.

    Raises:
        ConfigError: it cannot be loaded, or run over packed sequences with or without images, or its weights are of a
            type that no message carries.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_causal_lm(path, torch_dtype(dtype), device(on))
    if model.dtype not in DTYPES:
        raise ConfigError(f"{path} has weights of {model.dtype}; set engine.dtype to float32 or bfloat16")
    warn_if_slow(model.dtype, model.device, key="engine.dtype")
    reader = load_image_reader(path, model.config)
    if reader is not None:
        check_images(model, reader)
    return model, reader
