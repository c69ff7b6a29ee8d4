"""The process group of a rank that is alone, in the process of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from kdmesh_trainer.mesh import Mesh, joined


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Of one rank, on the CPU."""
    with joined("cpu", longest_wait_s=60) as alone:
        yield alone


def on_device(mesh: Mesh, device: torch.device) -> Mesh:
    """The rank that is alone, with its student and all that it computes on `device`."""
    alone = SimpleNamespace(size=lambda: 1, device_type=device.type)
    return replace(mesh, device=device, device_mesh=cast(DeviceMesh, alone))
