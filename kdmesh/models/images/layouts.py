"""What families of models write in an image's place, and what they are told of it: all that tells them apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

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
    """The smallest image: what stands for it, and its inputs; None: four pixels, as they are read."""


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

# LLaVA


def _part_llava(config: PretrainedConfig) -> int:
    vision = config.vision_config
    if vision.model_type not in _LEADING:
        raise ConfigError(
            f"models of type {config.model_type} with a vision tower of type {vision.model_type} are not known; "
            f"known are {', '.join(_LEADING)}"
        )
    left_out = 1 if config.vision_feature_select_strategy == "default" else 0
    return _grid(config) ** 2 + _LEADING[vision.model_type] - left_out


_LEADING = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Rows that a vision tower gives before those of patches."""


def _write_llava(sight: Sight, height: int, width: int) -> Written:
    return sight.parts(_part_llava(sight.config))


_LLAVA = ImageLayout(
    name="llava",
    write=_write_llava,
    inputs=("pixel_values",),
    counted=("size", "crop_size"),
    part_tokens=_part_llava,
)

# LLaVA-NeXT and LLaVA-OneVision: the whole image, then its tiles, of which rows without a pixel of it are cut away


def _tile_rows(sight: Sight, height: int, width: int) -> tuple[int, int]:
    """Of an image's tiles together: rows, and tokens in each, without the one that ends it."""
    config, grid = sight.config, _grid(sight.config)
    tiles = get_anyres_image_grid_shape(
        (height, width), config.image_grid_pinpoints, side(config.vision_config.image_size)
    )
    whole = torch.empty((1, tiles[0] * grid, tiles[1] * grid), device="meta")
    _, rows, columns = unpad_image(whole, (height, width)).shape
    return int(rows), int(columns)


def _write_llava_next(sight: Sight, height: int, width: int) -> Written:
    rows, columns = _tile_rows(sight, height, width)
    return sight.parts(_part_llava(sight.config) + rows * (columns + 1))


def _write_llava_onevision(sight: Sight, height: int, width: int) -> Written:
    rows, columns = _tile_rows(sight, height, width)
    most = int(sight.config.vision_aspect_ratio.removeprefix("anyres_max_"))  # tiles; more are scaled down
    if (ratio := math.sqrt(rows * columns / (most * _grid(sight.config) ** 2))) > _SCALED_FROM:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return sight.parts(_part_llava(sight.config) + rows * (columns + 1))


_SCALED_FROM = 1.1

_LLAVA_NEXT = ImageLayout(
    name="llava_next",
    write=_write_llava_next,
    inputs=("pixel_values", "image_sizes"),
    counted=("size", "crop_size", "image_grid_pinpoints"),
    part_tokens=_part_llava,
)
_LLAVA_ONEVISION = ImageLayout(
    name="llava_onevision",
    write=_write_llava_onevision,
    inputs=("pixel_values", "image_sizes"),
    counted=("size", "image_grid_pinpoints"),
    part_tokens=_part_llava,
)

# Pixtral, in Mistral 3


def _pixtral_patch(config: PretrainedConfig) -> int:
    """Pixels in width of what one token stands for."""
    return side(config.vision_config.patch_size) * int(config.spatial_merge_size)


def _write_pixtral(sight: Sight, height: int, width: int) -> Written:
    patch, size = _pixtral_patch(sight.config), sight.processor.size
    longest = size.longest_edge
    limits = (longest, longest) if longest else (size.height, size.width)
    picture = np.broadcast_to(np.uint8(0), (height, width, 3))  # which takes no memory
    rows, columns = (pixels // patch for pixels in get_resize_output_image_size(picture, limits, (patch, patch)))
    if rows * columns == 1:  # Mistral3Model in 5.24 squeezes the only row of such a one away
        raise ValueError(f"it becomes a single token; at least one side must have more than {patch} pixels")
    line = [*sight.parts(columns), sight.named("[IMG_BREAK]")]
    return [*(line * rows)[:-1], sight.named("[IMG_END]")]


def _blank_pixtral(sight: Sight) -> tuple[Written, Mapping[str, Tensor]]:
    patch = _pixtral_patch(sight.config)
    inputs = {"pixel_values": torch.zeros(1, 3, patch, 2 * patch), "image_sizes": torch.tensor([[patch, 2 * patch]])}
    return [*sight.parts(2), sight.named("[IMG_END]")], inputs


_PIXTRAL = ImageLayout(
    name="pixtral",
    write=_write_pixtral,
    inputs=("pixel_values", "image_sizes"),
    counted=("size",),
    part_tokens=_pixtral_patch,
    options=lambda config: {"patch_size": dict.fromkeys(("height", "width"), _pixtral_patch(config))},
    blank=_blank_pixtral,
)

# Idefics 3 and SmolVLM: its tiles row by row, then the whole image


def _part_idefics(config: PretrainedConfig) -> int:
    return int(_grid(config) ** 2 / config.scale_factor**2)


def _write_idefics(sight: Sight, height: int, width: int) -> Written:
    _, rows, columns = sight.processor.get_number_of_image_patches(height, width, {})
    around = sight.named("<fake_token_around_image>", "fake_image_token")
    part = sight.parts(_part_idefics(sight.config))
    written: Written = []
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            written += [around, f"<row_{row}_col_{column}>", *part]
        written.append("\n" if row < rows else "\n\n")
    return [*written, around, sight.named("<global-img>", "global_image_token"), *part, around]


def _blank_idefics(sight: Sight) -> tuple[Written, Mapping[str, Tensor]]:
    width = side(sight.config.vision_config.image_size)
    picture = torch.ones((1, 1, 3, width, width))  # of zeros it would be taken for padding
    inputs = {"pixel_values": picture, "pixel_attention_mask": torch.ones_like(picture[:, :, 0], dtype=torch.int64)}
    around = sight.named("<fake_token_around_image>", "fake_image_token")
    return [around, *sight.parts(_part_idefics(sight.config)), around], inputs


_IDEFICS = ImageLayout(
    name="idefics3",
    write=_write_idefics,
    inputs=("pixel_values", "pixel_attention_mask"),
    counted=("size", "max_image_size", "do_image_splitting"),
    part_tokens=_part_idefics,
    blank=_blank_idefics,
)

_LAYOUTS = {
    "internvl": _INTERNVL,
    "llava": _LLAVA,
    "llava_next": _LLAVA_NEXT,
    "llava_onevision": _LLAVA_ONEVISION,
    "mistral3": _PIXTRAL,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
}


def layout_of(config: PretrainedConfig) -> ImageLayout:
    """Of a model that reads images."""
    return _LAYOUTS.get(config.model_type, _QWEN)
