"""The models and data of the system tests."""

from __future__ import annotations

from tests.system.conftest import materials

__all__ = ["materials"]
