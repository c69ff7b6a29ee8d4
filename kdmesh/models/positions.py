"""How long a model's sequences may be, by what its configuration says of positions."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})
"""Types of rotary positions whose angles follow from the longest position of a forward, for all that is in it."""


def stated_limit(config: PretrainedConfig) -> int | None:
    """Most tokens of a sequence that is computed alone and at once; None when the model states no limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def safe_limit(config: PretrainedConfig) -> int | None:
    """Most tokens of a sequence that changes no other of its row, and that may grow; None: as stated_limit."""
    limits = [stated_limit(config)]
    limits += [
        rope.get("original_max_position_embeddings")
        for rope in _ropes(config)
        if rope.get("rope_type") == "longrope"  # beyond it, all positions of a forward get the other angles
    ]
    return min((limit for limit in limits if limit), default=None)


def rope_types(config: PretrainedConfig) -> set[str]:
    """Of all its layers; a model may have several sorts of them. Empty: it has no rotary positions."""
    return {str(rope.get("rope_type")) for rope in _ropes(config)}


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    told: dict[str, Any] = getattr(config.get_text_config(), "rope_parameters", None) or {}
    of_layer_types = [each for each in told.values() if isinstance(each, dict)]
    return of_layer_types or ([told] if told else [])
