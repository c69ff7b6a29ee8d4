"""Puts as many tokens in an image's place as the model reads it as."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kdmesh.errors import InvalidRequest
from kdmesh.types import Image, Int32Array, PlacedImage
from kdmesh_trainer.sources.turns import Reason, Unusable


class Expansion(Protocol):
    """How a model reads images, as models.ImageReader."""

    @property
    def token_id(self) -> int:
        """Of the token that the template writes once for an image."""
        ...

    def num_tokens(self, width: int, height: int) -> int:
        """Tokens that stand for an image of so many pixels. Raises InvalidRequest when the model takes none such."""
        ...


def expanded(
    token_ids: Int32Array, positions: Int32Array, images: Sequence[Image], expansion: Expansion
) -> tuple[Int32Array, Int32Array, tuple[PlacedImage, ...]] | Unusable:
    """The ids with every image at its length, the positions where their tokens are then, and the images' places.

    Args:
        token_ids: with one image token for each of `images`, in order.
    """
    places = np.flatnonzero(token_ids == expansion.token_id)
    if len(places) != len(images):
        detail = f"the template writes {len(places)} image tokens for {len(images)} images"
        return Unusable(reason=Reason.IMAGES, detail=detail)
    if not images:
        return token_ids, positions, ()
    try:
        counts = [expansion.num_tokens(image.width, image.height) for image in images]
    except InvalidRequest as error:
        return Unusable(reason=Reason.IMAGES, detail=str(error))
    repeats = np.ones(len(token_ids), np.int64)
    repeats[places] = counts
    ends = np.cumsum(repeats)
    placed = tuple(
        PlacedImage(digest=image.digest, first_token=int(end) - count, num_tokens=count, image=image)
        for image, end, count in zip(images, ends[places], counts, strict=True)
    )
    if any(one.end == other.first_token for one, other in itertools.pairwise(placed)):
        return Unusable(reason=Reason.IMAGES, detail="the template writes nothing between two images")
    return np.repeat(token_ids, repeats), (ends[positions] - 1).astype(np.int32), placed
