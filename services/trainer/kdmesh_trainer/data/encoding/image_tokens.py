"""Puts as many tokens in an image's place as the model reads it as, or says why a chat cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

from kdmesh.errors import InvalidRequest
from kdmesh.images import ImageTokens, expand_images
from kdmesh.types import Image, Int32Array, PlacedImage
from kdmesh_trainer.data.encoding.turns import Reason, Unusable


def expanded(
    token_ids: Int32Array, positions: Int32Array, images: Sequence[Image], tokens: ImageTokens
) -> tuple[Int32Array, Int32Array, tuple[PlacedImage, ...]] | Unusable:
    """As expand_images; Unusable where that refuses."""
    try:
        return expand_images(token_ids, positions, images, tokens)
    except InvalidRequest as error:
        return Unusable(reason=Reason.IMAGES, detail=str(error))
