"""Fixtures that every folder of tests may ask for."""

from __future__ import annotations

import os

from hypothesis import settings

# Of torch, here and in every process that a test starts: several of them share the cores, where threads that wait for
# each other's turn take ten times as long. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On shared cores an example's wall time says nothing about the code.
settings.register_profile("kdmesh", deadline=None)
settings.load_profile("kdmesh")

pytest_plugins = ["tests.support.lone_rank", "tests.support.tiny_models", "tests.support.tiny_vision"]
