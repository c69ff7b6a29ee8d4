"""Tiny configurations and image processors of models whose image tokens are numbered as words are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.support.tiny_vision_tokens import VOCABULARY_SIZE

TILE, PATCH = 16, 4  # pixels

_TEXT = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
    "initializer_range": 0.15,
}
_SQUARE = {"height": TILE, "width": TILE}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFamily:
    """How to make a tiny one."""

    config: dict[str, Any]  # of the model, beside its language model and its tokens
    processor: Callable[[], Any]  # of images
    told: dict[str, Any] = field(default_factory=dict)  # by the processor of texts and images, to that of images
    inputs: tuple[str, ...] = ("pixel_values",)  # what its forward pass takes of what the processor gives

    @property
    def text(self) -> dict[str, Any]:
        """What its language model is told."""
        return _TEXT


ROW_FAMILIES = {
    "internvl": RowFamily(
        config={"vision_config": _TOWER | {"image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]}},
        processor=lambda: GotOcr2ImageProcessorPil(size=_SQUARE, max_patches=4),
        told={"crop_to_patches": True},
    ),
}
"""Model type -> how to make a tiny one."""
