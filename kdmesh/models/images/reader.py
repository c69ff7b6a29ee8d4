"""What a model sees of an image, as the image processor beside it makes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, PretrainedConfig

from kdmesh.errors import ConfigError, InvalidRequest
from kdmesh.images import decoded, noise_image
from kdmesh.models.images.layouts import Sight, Written, layout_of
from kdmesh.models.images.vision import has_axes, reads_images
from kdmesh.models.quiet import quiet
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.types import Image, Int32Array

_FILES = ("preprocessor_config.json", "processor_config.json")  # either will do


class ImageReader:
    """Turns images into what the vision tower reads, and says which tokens stand for one.

    Attributes:
        token_id: of the token that stands for each part of an image.
        start_id: of the token that comes before an image; None: any may.
        expansion: names how an image's size becomes its tokens: two readers with the same one agree.
        fingerprint: names all that decides what the tower reads.
    """

    def __init__(self, sight: Sight) -> None:
        """
        Raises:
            ConfigError: the tokenizer lacks what stands for images.
        """
        config, processor = sight.config, sight.processor
        self._sight = sight
        self._layout = layout = layout_of(config)
        self.token_id: int = config.image_token_id
        self.start_id: int | None = config.vision_start_token_id if has_axes(config) else None
        told = processor.to_dict()
        counted = {name: told.get(name, getattr(processor, name, None)) for name in layout.counted}
        if not has_axes(config):
            counted |= {"family": layout.name, "part_tokens": layout.part_tokens(config)}
        self.expansion = _digest(counted)
        self.fingerprint = _digest(told)
        self._own_tokens = lru_cache(maxsize=1024)(self._written)  # many images have the same size
        self.tokens(64, 64)  # so that a token which is not there is missed now

    def tokens(self, width: int, height: int) -> Int32Array:
        """What stands for an image of so many pixels. Raises InvalidRequest when the model takes none such."""
        try:
            return self._own_tokens(height, width)
        except ValueError as error:
            raise InvalidRequest(f"an image of {width} x {height} pixels cannot be read: {error}") from None

    def inputs(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """What the model's forward pass takes of at least one image, by the names that it has there.

        Raises:
            InvalidRequest: an image's file has changed, or its bytes are damaged.
        """
        read = self._sight.processor(
            images=[decoded(image) for image in images],
            return_tensors="pt",
            **self._layout.options(self._sight.config),
        )
        return {name: read[name] for name in self._layout.inputs}

    def blank(self) -> tuple[Int32Array, Mapping[str, Tensor]]:
        """The tokens and inputs of a small image, for whoever must see one."""
        if self._layout.blank is None:
            return self.tokens(2, 2), self.inputs([noise_image(2, 2, seed=0)])
        written, inputs = self._layout.blank(self._sight)
        return self._ids(written), inputs

    def _written(self, height: int, width: int) -> Int32Array:
        return self._ids(self._layout.write(self._sight, height, width))

    def _ids(self, written: Written) -> Int32Array:
        ids = np.array([id_ for part in written for id_ in self._split(part)], np.int32)
        ids.flags.writeable = False  # all who ask for it share it
        return ids

    def _split(self, part: int | str) -> Sequence[int]:
        if isinstance(part, int):
            return (part,)
        assert self._sight.tokenizer is not None  # layouts with texts name tokens first
        ids: Sequence[int] = self._sight.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids


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
    if has_axes(config):
        _check_patches(path, processor, config.vision_config)
    return ImageReader(Sight(config=config, processor=processor, tokenizer=load_tokenizer(path)))


def _check_patches(path: Path, processor: Any, vision: PretrainedConfig) -> None:
    for name, own, wanted in (
        ("patch_size", processor.patch_size, vision.patch_size),
        ("merge_size", processor.merge_size, vision.spatial_merge_size),
        ("temporal_patch_size", processor.temporal_patch_size, vision.temporal_patch_size),
    ):
        if own != wanted:
            raise ConfigError(f"the image processor in {path} has {name} {own}; the model's config.json says {wanted}")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
