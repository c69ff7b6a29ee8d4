"""What a model sees of an image, as the image processor beside it makes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, PretrainedConfig

from kdmesh.errors import ConfigError, InvalidRequest
from kdmesh.images import decoded
from kdmesh.models.quiet import quiet
from kdmesh.models.vision import reads_images
from kdmesh.types import Image

_FILES = ("preprocessor_config.json", "processor_config.json")  # either will do


class ImageReader:
    """Turns images into patches, and says how many tokens stand for one.

    Attributes:
        token_id: of the token that stands for each part of an image.
        start_id: of the token that comes before an image.
        expansion: names how an image's size becomes a number of tokens: two readers with the same one agree.
    """

    def __init__(self, processor: Any, token_id: int, start_id: int) -> None:
        self._processor = processor
        self._merge_size: int = processor.merge_size
        self.token_id = token_id
        self.start_id = start_id
        told = processor.to_dict()
        expansion = {name: told.get(name) for name in ("do_resize", "size", "patch_size", "merge_size")}
        self.expansion = _digest(expansion)
        self.fingerprint = _digest(told)
        """Names all that decides the patches."""

    def num_tokens(self, width: int, height: int) -> int:
        """Tokens that stand for an image of so many pixels. Raises InvalidRequest when the model takes none such."""
        try:
            patches: int = self._processor.get_number_of_image_patches(height, width, {})
        except ValueError as error:
            raise InvalidRequest(f"an image of {width} x {height} pixels cannot be read: {error}") from None
        return patches // self._merge_size**2

    def patches(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """What the vision tower reads of at least one image.

        Returns:
            [P, C] float32 the patches of all of them, and [N, 3] int64 their extents in time, height and width.

        Raises:
            InvalidRequest: an image's file has changed, or its bytes are damaged.
        """
        read = self._processor(images=[decoded(image) for image in images], return_tensors="pt")
        return read["pixel_values"], read["image_grid_thw"]

    def blank(self) -> tuple[Tensor, Tensor]:
        """As `patches`, of the smallest image, all zeros, which one token stands for."""
        processor = self._processor
        channels = 3 * processor.temporal_patch_size * processor.patch_size**2
        side = processor.merge_size
        return torch.zeros(side**2, channels), torch.tensor([[1, side, side]])


def load_image_reader(path: Path, config: PretrainedConfig | None = None) -> ImageReader | None:
    """The reader of the model in directory `path`; None when the model reads text alone, or has no processor there.

    Args:
        config: the model's; None reads it.

    Raises:
        ConfigError: the files there do not make one.
    """
    with quiet():
        try:
            config = config or AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            if not reads_images(config) or not any((path / file).is_file() for file in _FILES):
                return None
            # Pillow's, whatever is installed: torchvision resizes otherwise, and all must see the same.
            processor = AutoImageProcessor.from_pretrained(
                path, backend="pil", local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ConfigError(f"the image processor in {path} cannot be loaded: {error}") from error
    vision = config.vision_config
    for name, own, wanted in (
        ("patch_size", processor.patch_size, vision.patch_size),
        ("merge_size", processor.merge_size, vision.spatial_merge_size),
        ("temporal_patch_size", processor.temporal_patch_size, vision.temporal_patch_size),
    ):
        if own != wanted:
            raise ConfigError(f"the image processor in {path} has {name} {own}; the model's config.json says {wanted}")
    return ImageReader(processor, config.image_token_id, config.vision_start_token_id)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
