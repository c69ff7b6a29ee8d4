"""Puts as many tokens in an image's place as the model reads it as."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdmesh.errors import InvalidRequest
from kdmesh.images import ImageTokens
from kdmesh.types import Image, Int32Array, PlacedImage
from kdmesh_trainer.sources.turns import Reason, Unusable


def expanded(
    token_ids: Int32Array, positions: Int32Array, images: Sequence[Image], tokens: ImageTokens
) -> tuple[Int32Array, Int32Array, tuple[PlacedImage, ...]] | Unusable:
    """The ids with every image at its length, the positions where their tokens are then, and the images' places.

    Args:
        token_ids: with one image token for each of `images`, in order.
    """
    places = np.flatnonzero(token_ids == tokens.token_id)
    if len(places) != len(images):
        detail = f"the template writes {len(places)} image tokens for {len(images)} images"
        return Unusable(reason=Reason.IMAGES, detail=detail)
    if not images:
        return token_ids, positions, ()
    if places[0] == 0 or (token_ids[places - 1] != tokens.start_id).any():
        return Unusable(reason=Reason.IMAGES, detail=f"the template does not write token {tokens.start_id} before each")
    try:
        counts = [tokens.num_tokens(image.width, image.height) for image in images]
    except InvalidRequest as error:
        return Unusable(reason=Reason.IMAGES, detail=str(error))
    repeats = np.ones(len(token_ids), np.int64)
    repeats[places] = counts
    ends = np.cumsum(repeats)
    placed = tuple(
        PlacedImage(digest=image.digest, first_token=int(end) - count, num_tokens=count, image=image)
        for image, end, count in zip(images, ends[places], counts, strict=True)
    )
    return np.repeat(token_ids, repeats), (ends[positions] - 1).astype(np.int32), placed
