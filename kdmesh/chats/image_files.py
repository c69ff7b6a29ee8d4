"""Finds the images that the rows of a file name, and says nothing of what they show until they are used."""

from __future__ import annotations

import base64
import binascii
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kdmesh.errors import DataError, InvalidRequest
from kdmesh.images import check_image_size, describe_image
from kdmesh.types import Image

_FETCH_S = 30.0
_DATA_URL = "data:image/"
_WEB = ("http://", "https://")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRules:
    """Which images may be read, and who says so."""

    root: Path | None  # that paths are relative to, and that none may leave; None: no path will do
    allow_urls: bool
    max_bytes: int  # encoded
    max_pixels: int
    root_key: str  # name of the setting of `root`
    why_no_urls: str  # where they are not allowed


class ImageSource(Protocol):
    """Where the images of messages come from."""

    def find(self, value: object, origin: str) -> Image:
        """The image that a message names.

        Raises:
            DataError: it is not to be had, or must not be; the message names the origin and the rule.
        """
        ...


class NoImages:
    """For a student that reads text alone."""

    def __init__(self, why: str) -> None:
        self._why = why

    def find(self, value: object, origin: str) -> Image:
        """Raises DataError."""
        raise DataError(f"{origin} is an image, and {self._why}")


class ImageFiles:
    """Images in files, in the rows themselves, or, where that is allowed, on the web."""

    def __init__(self, rules: ImageRules) -> None:
        self._rules = rules
        self._known: dict[bytes, Image] = {}  # one copy of what comes many times

    def find(self, value: object, origin: str) -> Image:
        """See ImageSource. A file is read twice: now, for its digest and its size, and when it is used."""
        data, file = self._read(value, origin)
        try:
            image = describe_image(data, file=file)
            check_image_size(image, max_bytes=self._rules.max_bytes, max_pixels=self._rules.max_pixels)
        except InvalidRequest as error:
            raise DataError(f"{origin}{'' if file is None else f': {file}'}: {error}") from None
        return self._known.setdefault(image.digest, image)

    def _read(self, value: object, origin: str) -> tuple[bytes, Path | None]:
        match value:
            case bytes():
                return value, None
            case str() if value.startswith(_DATA_URL):
                return _decoded(value.partition(",")[2], origin), None
            case str() if value.startswith(_WEB):
                return self._fetch(value, origin), None
            case str():
                file = self._file(value.removeprefix("file://"), origin)
                return _bytes_of(file, origin), file
            case Mapping():
                return self._read_fields(value, origin)
            case _:
                raise DataError(f"{origin}: an image must be a path, a data URL or bytes, not {type(value).__name__}")

    def _read_fields(self, value: Mapping[Any, Any], origin: str) -> tuple[bytes, Path | None]:
        """As Parquet files of images have them, and as chat messages do."""
        if isinstance(value.get("base64"), str):
            return _decoded(value["base64"], origin), None
        for name in ("bytes", "path", "url"):
            if value.get(name) is not None:
                return self._read(value[name], origin)
        raise DataError(f"{origin}: an image needs one of bytes, base64, path or url; keys found: {', '.join(value)}")

    def _file(self, name: str, origin: str) -> Path:
        key = self._rules.root_key
        if self._rules.root is None:
            raise DataError(f"{origin}: {name!r} is a path, and {key} does not say what it is relative to")
        root = self._rules.root.resolve()
        file = (root / name).resolve()
        if not file.is_relative_to(root):
            raise DataError(f"{origin}: {name!r} leads out of {root}; {key} may name another directory")
        return file

    def _fetch(self, url: str, origin: str) -> bytes:
        if not self._rules.allow_urls:
            raise DataError(f"{origin}: {url[:80]!r} is on the web, and {self._rules.why_no_urls}")
        most = self._rules.max_bytes
        try:
            with urllib.request.urlopen(url, timeout=_FETCH_S) as answer:
                data: bytes = answer.read(most + 1)
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise DataError(f"{origin}: {url[:80]!r} cannot be had: {error}") from None
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageColumn:
    """Where the images of a row are."""

    source: ImageSource
    name: str | None  # of the column of those that its messages do not name; None: there is none


class RowImages:
    """The images of one row: those that its messages name, and those of its column, one after the other."""

    def __init__(self, images: ImageColumn, row: Mapping[Any, Any], origin: str) -> None:
        column = None if images.name is None else row.get(images.name)
        if column is not None and not isinstance(column, list | tuple):
            raise DataError(f"{origin}: {images.name} must be a list of images, not {type(column).__name__}")
        self._images = images
        self._origin = origin
        self._column: Sequence[object] = column or ()
        self._num_used = 0

    def of_part(self, part: Mapping[Any, Any], origin: str) -> Image:
        """The image that a part of a message stands for."""
        for name in ("image", "image_url"):
            if part.get(name) is not None:
                return self._images.source.find(part[name], origin)
        if any(part.get(name) is not None for name in ("bytes", "base64", "path", "url")):
            return self._images.source.find(part, origin)
        if self._images.name is None:
            return self._images.source.find(None, origin)
        return self._images.source.find(self._next(origin), f"{self._origin}: {self._images.name}")

    def check_all_used(self) -> None:
        """Raises DataError when the column holds more images than its messages have places for."""
        if self._num_used < len(self._column):
            raise DataError(
                f"{self._origin}: {self._images.name} holds {len(self._column)} images, and the messages have "
                f"{self._num_used} parts of type image for them"
            )

    def _next(self, origin: str) -> object:
        if self._num_used >= len(self._column):
            raise DataError(f"{origin} names no image, and the row has {len(self._column)} in a column of them")
        self._num_used += 1
        return self._column[self._num_used - 1]


def _decoded(text: str, origin: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{origin}: an image is not base64: {error}") from None


def _bytes_of(file: Path, origin: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{origin}: cannot read the image {file}: {error.strerror or error}") from None
