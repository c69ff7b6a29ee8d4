"""Fixtures that every folder of tests may ask for."""

from __future__ import annotations

from hypothesis import settings

# On shared cores an example's wall time says nothing about the code.
settings.register_profile("kdmesh", deadline=None)
settings.load_profile("kdmesh")

pytest_plugins = ["tests.support.tiny_models", "tests.support.tiny_vision"]
