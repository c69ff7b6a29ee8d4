"""How models that read images are loaded and run beside those that read text alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from kdmesh.models.attention import PACKED_ATTENTION
from kdmesh.models.images.families import AXES_CLASSES, VISION_CLASSES


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


def unused_vision(lm: PreTrainedModel, inputs: Mapping[str, Tensor | list[Any]]) -> list[nn.Parameter]:
    """Parameters of the vision parts that rows of images do not depend on: LLaVA leaves out the tower's last layer.

    Args:
        inputs: of a small image; the tower is run on it, and nothing backward. Where tensors have no memory, numbers
            that it looks at are lists.
    """
    parameters = vision_parts(lm)[1]
    with torch.enable_grad():
        rows = lm.base_model.get_image_features(
            **{name: value.to(lm.device) if isinstance(value, Tensor) else value for name, value in inputs.items()},
            return_dict=True,
        ).pooler_output
    waiting = [row.grad_fn for row in rows if row.grad_fn is not None]
    seen, used = set(waiting), set[int]()
    while waiting:
        node = waiting.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            used.add(id(leaf))
        earlier = {function for function, _ in node.next_functions if function is not None} - seen
        seen |= earlier
        waiting += earlier
    return [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in used]


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
