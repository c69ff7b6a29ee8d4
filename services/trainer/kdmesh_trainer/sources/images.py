"""Finds the images that a dataset names, and says nothing of what they show until they are used."""

from __future__ import annotations

import base64
import binascii
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from kdmesh.errors import DataError, InvalidRequest
from kdmesh.images import check_image_size, describe_image
from kdmesh.types import Image
from kdmesh_trainer.data_config import ImagesConfig

_MIB = 2**20
_FETCH_S = 30.0
_DATA_URL = "data:image/"
_WEB = ("http://", "https://")


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


class DatasetImages:
    """Images in files, in the dataset itself, or, where that is allowed, on the web."""

    def __init__(self, cfg: ImagesConfig, directory: Path | None) -> None:
        """`directory` is that of the dataset; None: it has none, so that paths need `cfg.root`."""
        self._cfg = cfg
        self._root = directory if cfg.root is None else cfg.root
        self._known: dict[bytes, Image] = {}  # one copy of what comes many times

    def find(self, value: object, origin: str) -> Image:
        """See ImageSource. A file is read twice: now, for its digest and its size, and when it is used."""
        data, file = self._read(value, origin)
        try:
            image = describe_image(data, file=file)
            check_image_size(image, max_bytes=int(self._cfg.max_mib * _MIB), max_pixels=self._cfg.max_pixels)
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
        if self._root is None:
            raise DataError(f"{origin}: {name!r} is a path, and data.images.root does not say what it is relative to")
        root = self._root.resolve()
        file = (root / name).resolve()
        if not file.is_relative_to(root):
            raise DataError(f"{origin}: {name!r} leads out of {root}; data.images.root may name another directory")
        return file

    def _fetch(self, url: str, origin: str) -> bytes:
        if not self._cfg.allow_urls:
            raise DataError(f"{origin}: {url[:80]!r} is on the web, and data.images.allow_urls is false")
        most = int(self._cfg.max_mib * _MIB)
        try:
            with urllib.request.urlopen(url, timeout=_FETCH_S) as answer:
                data: bytes = answer.read(most + 1)
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise DataError(f"{origin}: {url[:80]!r} cannot be had: {error}") from None
        return data


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
