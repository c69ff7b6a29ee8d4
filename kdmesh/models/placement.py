"""The element type and the device that a configuration asks for."""

from __future__ import annotations

from typing import Literal

import torch

from kdmesh.errors import ConfigError
from kdmesh.types import DType

DTYPES = {torch.float32: DType.FLOAT32, torch.bfloat16: DType.BFLOAT16, torch.float16: DType.FLOAT16}
"""Those that cross a service boundary."""


def torch_dtype(name: str) -> torch.dtype | Literal["auto"]:
    """The type of that name; auto is left to the checkpoint."""
    return "auto" if name == "auto" else next(dtype for dtype, wire in DTYPES.items() if wire == name)


def device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of that name; auto is the GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device is cuda, but torch finds no usable GPU here")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def gpu(name: Literal["auto", "cpu", "cuda"]) -> torch.device | None:
    """The device of that name where it is a GPU. Raises ConfigError as `device`."""
    found = device(name)
    return found if found.type == "cuda" else None
