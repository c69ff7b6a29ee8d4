"""Bytes as a tensor."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor


def octets(data: memoryview) -> Tensor:
    """Over the same memory. It may be read-only, which nobody notices who only reads, but torch would warn of."""
    address = np.frombuffer(data, np.uint8).ctypes.data
    exporter = (ctypes.c_char * data.nbytes).from_address(address)
    exporter._data = data  # type: ignore[attr-defined]  # lives as long as the tensor
    return torch.frombuffer(exporter, dtype=torch.uint8)
