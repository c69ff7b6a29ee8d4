"""The process group of a rank that is alone, in the process of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kdmesh_trainer.mesh import Mesh, joined


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Of one rank, on the CPU."""
    with joined("cpu", longest_wait_s=60) as alone:
        yield alone
