"""What samples count, in jobs of tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def by_level(response: str, row: Mapping[str, Any], is_cut_off: bool, *, per_letter: float) -> float:
    """By the row's level, and a little by the response; no row of level 0 counts."""
    level: float = row["level"]
    return level * (1 + per_letter * len(response)) * (0.5 if is_cut_off else 1)
