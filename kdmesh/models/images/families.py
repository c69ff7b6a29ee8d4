"""Which models read images, by their types; without torch, so that it can be asked before anything loads."""

from __future__ import annotations

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
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
"""Model type -> its class, of those whose image tokens are numbered and attended to as words are."""

VISION_CLASSES = AXES_CLASSES | ROW_CLASSES
"""Those that are known to work: rows that a vision tower makes of an image take the place of its tokens."""

UNREAD = {"gemma3": "its image tokens attend to those behind them too, and packed attention looks back alone"}
"""Model type -> why no images are read, of models that have a vision tower and are run as models of text."""
