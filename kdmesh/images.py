"""Encoded images: what they are, and what they show."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image
from PIL import ImageOps

from kdmesh.errors import InvalidRequest
from kdmesh.types import IMAGE_DIGEST_BYTES, Image, Int32Array, PlacedImage, TokenSequence

FORMATS = ("PNG", "JPEG", "WEBP")

# Cameras' formats; MPO is a JPEG with a second one behind it. Of a PNG, EXIF data may come after all of its pixels.
_TURNED = ("JPEG", "MPO", "WEBP")
_LAST = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}  # what ends it; WEBP says its length at the start
_ORIENTATION = 0x0112  # of EXIF
_LYING = (5, 6, 7, 8)  # orientations that swap width and height

# What Pillow raises for bytes that are not an image, or not a whole one.
_FAILURES = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)


class ImagesMissing(Exception):
    """A server was asked about images that it does not have. No failure: they are put, and it is asked again."""

    def __init__(self, digests: tuple[bytes, ...]) -> None:
        super().__init__(f"{len(digests)} images are missing")
        self.digests = digests


class ImageTokens(Protocol):
    """How a model reads images, as models.ImageReader."""

    @property
    def token_id(self) -> int:
        """Of the token that stands for each part of an image."""
        ...

    @property
    def start_id(self) -> int | None:
        """Of the token that must come before an image, so that models number what follows; None: any may."""
        ...

    def tokens(self, width: int, height: int) -> Int32Array:
        """What stands for an image of so many pixels. Raises InvalidRequest when the model takes none such."""
        ...


def after_first_token(image: Image, token_ids: Int32Array, tokens: ImageTokens) -> TokenSequence:
    """`token_ids` with the image behind the first, which opens it, and every row after it wanted.

    Image tokens that were among them are 0.
    """
    own = tokens.tokens(image.width, image.height)
    num_tokens = len(own)
    text = np.where(token_ids == tokens.token_id, 0, token_ids)
    if tokens.start_id is not None:
        text[0] = tokens.start_id
    ids = np.insert(text, 1, own).astype(np.int32)
    return TokenSequence(
        token_ids=ids,
        positions=np.arange(num_tokens + 1, len(ids) - 1, dtype=np.int32),
        images=(PlacedImage(digest=image.digest, first_token=1, num_tokens=num_tokens, image=image),),
    )


def expand_images(
    token_ids: Int32Array, positions: Int32Array, images: Sequence[Image], tokens: ImageTokens
) -> tuple[Int32Array, Int32Array, tuple[PlacedImage, ...]]:
    """The ids with images as the model writes them, the positions where their tokens are then, and the images' places.

    Args:
        token_ids: with one image token for each of `images`, in order.

    Raises:
        InvalidRequest: the ids have other image tokens, or the model does not take such an image.
    """
    places = np.flatnonzero(token_ids == tokens.token_id)
    if len(places) != len(images):
        raise InvalidRequest(f"the template writes {len(places)} image tokens for {len(images)} images")
    if not images:
        return token_ids, positions, ()
    if tokens.start_id is not None and (places[0] == 0 or (token_ids[places - 1] != tokens.start_id).any()):
        raise InvalidRequest(f"the template does not write token {tokens.start_id} before each")
    own = [tokens.tokens(image.width, image.height) for image in images]
    repeats = np.ones(len(token_ids), np.int64)
    repeats[places] = [len(ids) for ids in own]
    ends = np.cumsum(repeats)
    expanded = np.repeat(token_ids, repeats)
    placed = []
    for image, end, ids in zip(images, ends[places], own, strict=True):
        first = int(end) - len(ids)
        expanded[first:end] = ids
        placed.append(PlacedImage(digest=image.digest, first_token=first, num_tokens=len(ids), image=image))
    return expanded, (ends[positions] - 1).astype(np.int32), tuple(placed)


def describe_image(data: bytes, *, file: Path | None = None) -> Image:
    """The image that `data` encodes; its pixels are not decoded.

    Args:
        file: where `data` comes from, to be read again when the image is used; None keeps `data`.

    Raises:
        InvalidRequest: it is not an image of one of FORMATS, or was cut short.
    """
    stream = io.BytesIO(data)
    try:
        with PIL.Image.open(stream, formats=FORMATS) as image:
            header_bytes = stream.tell()  # a preview in it has an end of its own
            last, width, height = _LAST.get(str(image.format), b""), *image.size
            if image.format in _TURNED and image.getexif().get(_ORIENTATION) in _LYING:
                width, height = height, width
    except PIL.UnidentifiedImageError:  # it says nothing but where Pillow looked
        raise InvalidRequest(f"{len(data)} bytes are not an image of {', '.join(FORMATS)}") from None
    except _FAILURES as error:
        raise InvalidRequest(f"{len(data)} bytes are not an image of {', '.join(FORMATS)}: {error}") from None
    if data.find(last, header_bytes) < 0:
        raise InvalidRequest(f"{len(data)} bytes are an image of {width} x {height} pixels that is cut short")
    return Image(
        digest=image_digest(data), data=data if file is None else file, size_bytes=len(data), width=width, height=height
    )


def image_digest(data: bytes) -> bytes:
    """What names the image that `data` encodes."""
    return hashlib.blake2b(data, digest_size=IMAGE_DIGEST_BYTES).digest()


def check_image_size(image: Image, *, max_bytes: int, max_pixels: int) -> None:
    """Raises InvalidRequest, with the value and the limit, when an image is larger."""
    if image.size_bytes > max_bytes:
        raise InvalidRequest(f"an image has {image.size_bytes} bytes; the most allowed is {max_bytes}")
    if image.width * image.height > max_pixels:
        raise InvalidRequest(
            f"an image has {image.width} x {image.height} pixels; the most allowed is {max_pixels} in all"
        )


def encoded(image: Image) -> bytes:
    """Its encoded bytes, read from its file where it lies in one. Raises InvalidRequest when the file has changed."""
    if isinstance(image.data, bytes):
        return image.data
    try:
        data = image.data.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"the image {image.data} cannot be read: {error.strerror}") from None
    if image_digest(data) != image.digest:
        raise InvalidRequest(f"the image {image.data} has changed since the dataset was read")
    return data


def data_url(image: Image) -> str:
    """A URL that holds its encoded bytes. Raises InvalidRequest when its file has changed."""
    data = encoded(image)
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        name = "jpeg" if opened.format == "MPO" else str(opened.format).lower()
    return f"data:image/{name};base64,{base64.b64encode(data).decode()}"


def noise_image(width: int, height: int, *, seed: int) -> Image:
    """A picture of noise, the same for equal arguments."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return describe_image(file.getvalue())


def decoded(image: Image) -> PIL.Image.Image:
    """Its pixels in RGB, turned as its EXIF data say.

    Raises:
        InvalidRequest: its file has changed, or the bytes are damaged.
    """
    try:
        with PIL.Image.open(io.BytesIO(encoded(image)), formats=FORMATS) as opened:
            return (ImageOps.exif_transpose(opened) if opened.format in _TURNED else opened).convert("RGB")
    except _FAILURES as error:
        name = image.data if isinstance(image.data, Path) else f"of digest {image.digest.hex()[:16]}"
        raise InvalidRequest(f"the image {name} is damaged: {error}") from None
