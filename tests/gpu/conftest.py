"""The device that the suite runs on: a GPU, or a CPU where Triton's interpreter stands in for the compiled kernel."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors go."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1")
    return torch.device("cuda")


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """For what means nothing in an interpreter."""
    if device.type == "cpu":
        pytest.skip("means nothing in an interpreter")
    return device
