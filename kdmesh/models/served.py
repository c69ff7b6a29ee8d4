"""Loads the model that an engine of transformers serves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from kdmesh.allowance import num_cores
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
        threads: torch's, for the whole process; None leaves as many of them as there are cores for.

    Raises:
        ConfigError: it cannot be loaded, or run over packed sequences with or without images, or its weights are of a
            type that no message carries.
    """
    _use_threads(threads)
    model = load_causal_lm(path, torch_dtype(dtype), device(on))
    if model.dtype not in DTYPES:
        raise ConfigError(f"{path} has weights of {model.dtype}; set engine.dtype to float32 or bfloat16")
    warn_if_slow(model.dtype, model.device, key="engine.dtype")
    reader = load_image_reader(path, model.config)
    if reader is not None:
        check_images(model, reader)
    return model, reader


def _use_threads(threads: int | None) -> None:
    """torch counts the machine's cores, whatever a container may have of them."""
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = min(torch.get_num_threads(), num_cores())
    if threads is not None:
        torch.set_num_threads(threads)
