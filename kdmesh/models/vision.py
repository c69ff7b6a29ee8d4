"""Which models read images, and how they are loaded and run beside those that read text alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from kdmesh.models.attention import PACKED_ATTENTION

AXES_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
"""Model type -> its class, of those whose image tokens have positions in three axes."""

ROW_CLASSES = {
    "internvl": "InternVLForConditionalGeneration",
}
"""Model type -> its class, of those whose image tokens are numbered and attended to as words are."""

VISION_CLASSES = AXES_CLASSES | ROW_CLASSES
"""Those that are known to work: rows that a vision tower makes of an image take the place of its tokens."""


def reads_images(config: PretrainedConfig) -> bool:
    """Whether the model of `config` is one of VISION_CLASSES."""
    return config.model_type in VISION_CLASSES


def has_axes(config: PretrainedConfig) -> bool:
    """Whether image tokens have positions in time, height and width."""
    return config.model_type in AXES_CLASSES


def vision_parts(lm: PreTrainedModel) -> tuple[set[nn.Module], list[nn.Parameter]]:
    """The modules that make rows of images, and all their parameters: what is beside the language model."""
    inside = set(lm.get_decoder().modules())
    parts = {module for module in lm.base_model.modules() if module not in inside}
    return parts, [parameter for module in parts for parameter in module.parameters(recurse=False)]


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' factory of such models."""
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def attention_of(config: PretrainedConfig, language: str = PACKED_ATTENTION) -> str | dict[str, str]:
    """`attn_implementation` for from_pretrained or set_attn_implementation.

    A vision tower keeps images apart by itself, and is not causal: packed attention is for the language model.
    """
    if not reads_images(config):
        return language
    return {"": language, "text_config": language, "vision_config": "eager" if language == "eager" else "sdpa"}
