"""Images that clients have brought, for whatever request names them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from kdmesh.errors import InvalidRequest
from kdmesh.images import ImagesMissing, ImageTokens, check_image_size, decoded, describe_image
from kdmesh.serving.images_config import ImagesConfig
from kdmesh.serving.lru import LeastRecentlyUsed
from kdmesh.types import Image, Int32Array, PlacedImage, TokenSequence, VisionSpec


class Vision(ImageTokens, Protocol):
    """With the name that clients compare."""

    @property
    def expansion(self) -> str:
        """See VisionSpec."""
        ...


class ImageStore:
    """Keeps images by their digest; the one that was not used for longest makes place. Belongs to one event loop.

    Attributes:
        spec: what clients are told.
    """

    def __init__(self, vision: Vision, cfg: ImagesConfig) -> None:
        self._vision = vision
        self._images = LeastRecentlyUsed[Image](cfg.memory_bytes)
        self.spec = VisionSpec(
            image_token_id=vision.token_id,
            expansion=vision.expansion,
            max_image_bytes=cfg.max_image_bytes,
            max_image_pixels=cfg.max_image_pixels,
        )

    async def put(self, encoded: Sequence[bytes]) -> None:
        """Take these images. Each is decoded once, in a thread, so that a damaged one is refused here.

        Raises:
            InvalidRequest: there is none, or one is no image, damaged or too large; the others before it are kept.
        """
        if not encoded:
            raise InvalidRequest("the request holds no image; it needs at least one")
        for data in encoded:
            image = await asyncio.to_thread(self._checked, data)
            self._images.add(image.digest, image, image.size_bytes)

    def resolved(self, sequences: Sequence[TokenSequence]) -> tuple[TokenSequence, ...]:
        """The sequences, which now hold their images.

        Raises:
            ImagesMissing: some are not here.
            InvalidRequest: an image token belongs to no image, or an image's tokens are not what the model's image
                processor writes for it.
        """
        for index, sequence in enumerate(sequences):
            self._check_tokens(index, sequence)
        placed = {image.digest for sequence in sequences for image in sequence.images}
        missing = tuple(digest for digest in placed if digest not in self._images)
        if missing:
            raise ImagesMissing(missing)
        return tuple(
            replace(sequence, images=tuple(self._resolve(index, sequence, image) for image in sequence.images))
            if sequence.images
            else sequence
            for index, sequence in enumerate(sequences)
        )

    def resolved_prompt(self, prompt_ids: Int32Array, images: tuple[PlacedImage, ...]) -> tuple[PlacedImage, ...]:
        """The images of a prompt, at hand. Raises as `resolved`."""
        # A sequence has a token after its last position; which one does not matter.
        ids = np.append(prompt_ids, np.int32(0 if self.spec.image_token_id else 1))
        position = np.array([len(prompt_ids) - 1], np.int32)
        [sequence] = self.resolved([TokenSequence(token_ids=ids, positions=position, images=images)])
        return sequence.images

    def _check_tokens(self, index: int, sequence: TokenSequence) -> None:
        token_id, start_id = self.spec.image_token_id, self._vision.start_id
        is_image_T = sequence.token_ids == token_id
        there = int(is_image_T.sum())
        for image in sequence.images:
            before = int(sequence.token_ids[image.first_token - 1]) if image.first_token else None
            if start_id is not None and before != start_id:
                raise InvalidRequest(f"sequence {index} has token {before} before an image; it must be {start_id}")
        known = sum(int(is_image_T[image.first_token : image.end].sum()) for image in sequence.images)
        if there != known:
            raise InvalidRequest(
                f"sequence {index} has {there} image tokens (id {token_id}), and {known} of them belong to its images; "
                "every one must"
            )

    def _resolve(self, index: int, sequence: TokenSequence, placed: PlacedImage) -> PlacedImage:
        image = self._images.use(placed.digest)
        assert image is not None  # `resolved` has looked
        own = self._vision.tokens(image.width, image.height)
        if placed.num_tokens != len(own):
            raise InvalidRequest(
                f"sequence {index} has {placed.num_tokens} tokens for an image of {image.width} x {image.height} "
                f"pixels; this model's image processor makes {len(own)} of it"
            )
        other = np.flatnonzero(sequence.token_ids[placed.first_token : placed.end] != own)
        if len(other):
            place = placed.first_token + int(other[0])
            raise InvalidRequest(
                f"sequence {index} has token {int(sequence.token_ids[place])} at {place}, within an image; this "
                f"model's image processor writes {int(own[other[0]])} there"
            )
        return replace(placed, image=image)

    def _checked(self, data: bytes) -> Image:
        image = describe_image(data)
        check_image_size(image, max_bytes=self.spec.max_image_bytes, max_pixels=self.spec.max_image_pixels)
        decoded(image)
        return image
