"""Brings a server the images that it says it lacks, so that each travels once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

from kdmesh.errors import EngineFailure, Unavailable
from kdmesh.images import ImagesMissing, encoded
from kdmesh.types import Image, PlacedImage

T = TypeVar("T")

_MESSAGE_BYTES = 15 * 2**20  # below channel.MAX_MESSAGE_BYTES
_ROUNDS = 4  # each of which other clients' images may have pushed ours out of


async def with_images(
    ask: Callable[[], Awaitable[T]],
    put: Callable[[Sequence[bytes]], Awaitable[object]],
    images: Sequence[PlacedImage],
) -> T:
    """What `ask` answers once the server has every one of `images`.

    Args:
        ask: raises ImagesMissing when it has not.
        put: sends encoded images, as many as one message holds.

    Raises:
        Unavailable: the server keeps losing them.
        EngineFailure: it lacks an image that was not named.
        InvalidRequest: an image's file has changed since the dataset was read.
    """
    for _ in range(_ROUNDS):
        try:
            return await ask()
        except ImagesMissing as missing:
            lacked = _named(missing.digests, images)
        for group in _messages(lacked):
            await put([await asyncio.to_thread(encoded, image) for image in group])
    raise Unavailable(f"the server lost images {_ROUNDS} times before it used them: raise its images.memory_mib")


def _named(digests: Sequence[bytes], images: Sequence[PlacedImage]) -> list[Image]:
    known = {placed.digest: placed.image for placed in images}
    lacked = [known.get(digest) for digest in digests]
    if not lacked or None in lacked:
        raise EngineFailure(f"the server lacks {len(digests)} images, and not all of them were named")
    return [image for image in lacked if image is not None]


def _messages(images: Sequence[Image]) -> Iterator[list[Image]]:
    group: list[Image] = []
    size_bytes = 0
    for image in images:
        if group and size_bytes + image.size_bytes > _MESSAGE_BYTES:
            yield group
            group, size_bytes = [], 0
        group.append(image)
        size_bytes += image.size_bytes
    yield group
