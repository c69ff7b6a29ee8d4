"""What families of models write in an image's place, and what they are told of it: all that tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kdmesh.errors import ConfigError

Written = list[int | str]
"""Tokens by their ids, and texts, each of which is split into tokens by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What decides how a model reads images."""

    config: PretrainedConfig
    processor: Any  # of images, transformers'
    tokenizer: PreTrainedTokenizerBase | None

    def parts(self, number: int) -> Written:
        """So many of the token that stands for each part of an image."""
        return [self.config.image_token_id] * number

    def named(self, usual: str, attribute: str = "") -> int:
        """A token that the tokenizer may call otherwise than usual, by an attribute of its own.

        Raises:
            ConfigError: it has none such.
        """
        token = str(getattr(self.tokenizer, attribute, usual)) if attribute else usual
        vocabulary = {} if self.tokenizer is None else self.tokenizer.get_vocab()
        if token not in vocabulary:
            where = "there is no tokenizer" if self.tokenizer is None else f"{self.tokenizer.name_or_path} has none"
            raise ConfigError(f"images are written with the token {token}, and {where}")
        return int(vocabulary[token])


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLayout:
    """How models of one family read images, beside what all do alike."""

    name: str
    """Of the family: models of one read images alike."""

    write: Callable[[Sight, int, int], Written]
    """What stands for an image of so many pixels in height and width."""

    inputs: tuple[str, ...]
    """What the model takes of what the processor gives."""

    counted: tuple[str, ...]
    """Settings of the processor that decide how many tokens an image becomes."""

    part_tokens: Callable[[PretrainedConfig], int] = lambda config: 1
    """Image tokens for each picture that the vision tower reads; 1 where they depend on its size."""

    options: Callable[[PretrainedConfig], Mapping[str, Any]] = field(default=lambda config: {})
    """What the processor is told beside its own settings, as the model's processor of texts and images tells it."""

    blank: Callable[[Sight], tuple[Written, Mapping[str, Tensor]]] | None = None
    """The smallest image that the model reads: what stands for it, and its inputs; None: a pixel, as it is read."""


def side(value: Any) -> int:
    """Of a square, which configurations give once or twice."""
    return int(value[0] if isinstance(value, list | tuple) else value)


def _grid(config: PretrainedConfig) -> int:
    """Patches in a row of a picture that the vision tower reads."""
    vision = config.vision_config
    return side(vision.image_size) // side(vision.patch_size)


# Qwen-VL


def _write_qwen(sight: Sight, height: int, width: int) -> Written:
    patches: int = sight.processor.get_number_of_image_patches(height, width, {})
    return sight.parts(patches // int(sight.processor.merge_size) ** 2)


def _blank_qwen(sight: Sight) -> tuple[Written, Mapping[str, Tensor]]:
    processor = sight.processor
    channels, merge = 3 * processor.temporal_patch_size * processor.patch_size**2, processor.merge_size
    inputs = {"pixel_values": torch.zeros(merge**2, channels), "image_grid_thw": torch.tensor([[1, merge, merge]])}
    return sight.parts(1), inputs


_QWEN = ImageLayout(
    name="qwen",
    write=_write_qwen,
    inputs=("pixel_values", "image_grid_thw"),
    counted=("do_resize", "size", "patch_size", "merge_size"),
    blank=_blank_qwen,
)

# InternVL


def _part_internvl(config: PretrainedConfig) -> int:
    return round(_grid(config) * float(config.downsample_ratio)) ** 2


def _write_internvl(sight: Sight, height: int, width: int) -> Written:
    parts: int = sight.processor.get_number_of_image_patches(height, width, _INTERNVL.options(sight.config))
    begin, end = sight.named("<img>", "start_image_token"), sight.named("</img>", "end_image_token")
    return [begin, *sight.parts(parts * _part_internvl(sight.config)), end]


_INTERNVL = ImageLayout(
    name="internvl",
    write=_write_internvl,
    inputs=("pixel_values",),
    counted=("size", "min_patches", "max_patches"),
    part_tokens=_part_internvl,
    options=lambda config: {"crop_to_patches": True},
)

_LAYOUTS = {"internvl": _INTERNVL}


def layout_of(config: PretrainedConfig) -> ImageLayout:
    """Of a model that reads images."""
    return _LAYOUTS.get(config.model_type, _QWEN)
