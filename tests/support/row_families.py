"""Tiny configurations and image processors of models whose image tokens are numbered as words are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.support.tiny_vision_tokens import TINY_TEXT, VOCABULARY_SIZE

TILE, PATCH = 16, 4  # pixels

_TEXT = {
    "model_type": "qwen3",
    **TINY_TEXT,
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
    writer: str  # its module and class, of the processor of texts and images, transformers'
    settings: dict[str, Any] = field(default_factory=dict)  # of it
    told: dict[str, Any] = field(default_factory=dict)  # by the processor of texts and images, to that of images
    inputs: tuple[str, ...] = ("pixel_values",)  # what its forward pass takes of what the processor gives

    @property
    def text(self) -> dict[str, Any]:
        """What its language model is told."""
        return _TEXT


_LLAVA = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_CLIP = _TOWER | {"model_type": "clip_vision_model", "projection_dim": 32}
_SIGLIP = _TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
_PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [TILE, 3 * TILE]]
_PIXTRAL_PATCH = {"height": 2 * PATCH, "width": 2 * PATCH}
_AROUND = {
    "image_seq_len": 4,
    "fake_image_token": "<fake_token_around_image>",
    "global_image_tag": "<global-img>",
    "global_image_token": "<global-img>",
}
_IDEFICS = {"vision_config": _TOWER, "scale_factor": 2}
_TILED = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}

ROW_FAMILIES = {
    "internvl": RowFamily(
        writer="internvl.InternVLProcessor",
        settings={"image_seq_length": 4, "start_image_token": "<img>", "end_image_token": "</img>"},
        config={"vision_config": _TOWER | {"image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]}},
        processor=lambda: GotOcr2ImageProcessorPil(size=_SQUARE, max_patches=4),
        told={"crop_to_patches": True},
    ),
    "llava": RowFamily(
        writer="llava.LlavaProcessor",
        settings=_LLAVA,
        config={"vision_config": _CLIP},
        processor=lambda: CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size=_SQUARE),
    ),
    "llava_next": RowFamily(
        writer="llava_next.LlavaNextProcessor",
        settings=_LLAVA,
        config={"vision_config": _CLIP, "image_grid_pinpoints": _PINPOINTS},
        processor=lambda: LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE}, crop_size=_SQUARE, image_grid_pinpoints=_PINPOINTS
        ),
        inputs=("pixel_values", "image_sizes"),
    ),
    "llava_onevision": RowFamily(
        writer="llava_onevision.LlavaOnevisionProcessor",
        settings={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_2",
        },
        config={
            "vision_config": _SIGLIP,
            "image_grid_pinpoints": _PINPOINTS,
            "vision_aspect_ratio": "anyres_max_2",  # so that four tiles are scaled down
            "video_token_id": VOCABULARY_SIZE - 1,
        },
        processor=lambda: LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=_PINPOINTS),
        inputs=("pixel_values", "image_sizes"),
    ),
    "mistral3": RowFamily(
        writer="pixtral.PixtralProcessor",
        settings={
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
        config={"vision_config": _TOWER | {"model_type": "pixtral", "image_size": 64, "head_dim": 16}},
        processor=lambda: PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size=_PIXTRAL_PATCH),
        told={"patch_size": _PIXTRAL_PATCH},
        inputs=("pixel_values", "image_sizes"),
    ),
    "idefics3": RowFamily(
        writer="idefics3.Idefics3Processor",
        settings=_AROUND,
        config=_IDEFICS,
        told={"return_row_col_info": True},
        processor=lambda: Idefics3ImageProcessorPil(**_TILED),
        inputs=("pixel_values", "pixel_attention_mask"),
    ),
    "smolvlm": RowFamily(
        writer="smolvlm.SmolVLMProcessor",
        settings=_AROUND,
        config=_IDEFICS,
        told={"return_row_col_info": True},
        processor=lambda: SmolVLMImageProcessorPil(
            size={"longest_edge": 3 * TILE}, max_image_size={"longest_edge": TILE}
        ),
        inputs=("pixel_values", "pixel_attention_mask"),
    ),
}
"""Model type -> how to make a tiny one."""
