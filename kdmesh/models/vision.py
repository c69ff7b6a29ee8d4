"""Which models read images, and how they are loaded and run beside those that read text alone."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from kdmesh.models.attention import PACKED_ATTENTION

VISION_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
"""Model type -> its class, of those that are known to work: images become tokens of the text, with positions in three
axes."""


def reads_images(config: PretrainedConfig) -> bool:
    """Whether the model of `config` is one of VISION_CLASSES."""
    return config.model_type in VISION_CLASSES


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
