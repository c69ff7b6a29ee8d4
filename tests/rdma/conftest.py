"""NIXL over its test transports: these tests are about the door, not about any network."""

from __future__ import annotations

import importlib.util

import pytest

from kdmesh.handles.rdma.agent import UNSAFE_VALUE, UNSAFE_VARIABLE


@pytest.fixture(autouse=True)
def trusted_transports(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX over TCP, here and in every process that is started."""
    if importlib.util.find_spec("nixl_cu12") is None:
        pytest.skip("NIXL is not installed; make test-rdma installs it")
    monkeypatch.setenv(UNSAFE_VARIABLE, UNSAFE_VALUE)
    monkeypatch.setenv("UCX_TLS", "tcp")
