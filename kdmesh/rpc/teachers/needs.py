"""The most that a job asks of a teacher at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

from kdmesh.types import ModelDescription, PlacedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Each of the sequence, or the image, that has most of it; 0: nothing is known of any."""

    tokens: int = 0
    rows: int = 0
    image_bytes: int = 0  # encoded
    image_pixels: int = 0

    @classmethod
    def of(cls, *, tokens: int = 0, rows: int = 0, images: Iterable[PlacedImage] = ()) -> Self:
        """Of the longest sequence, and of images that have their data."""
        seen = [placed.image for placed in images if placed.image is not None]
        return cls(
            tokens=tokens,
            rows=rows,
            image_bytes=max((image.size_bytes for image in seen), default=0),
            image_pixels=max((image.width * image.height for image in seen), default=0),
        )

    def __or__(self, other: Needs) -> Needs:
        """Both."""
        return Needs(**{each.name: max(getattr(self, each.name), getattr(other, each.name)) for each in fields(Needs)})

    def missed_by(self, model: ModelDescription) -> str:
        """What the model takes too little of, with both numbers; empty: it takes everything."""
        vision = model.vision
        if self.image_bytes and vision is None:
            return "reads no images, and this job has some"
        limits = (
            (self.tokens, min(model.max_sequence_tokens, model.max_request_tokens), "sequences", "tokens"),
            (self.rows, model.max_request_rows, "sequences", "loss tokens"),
            (self.image_bytes, 0 if vision is None else vision.max_image_bytes, "images", "bytes"),
            (self.image_pixels, 0 if vision is None else vision.max_image_pixels, "images", "pixels"),
        )
        for needed, most, what, unit in limits:
            if needed > most:
                return f"takes {what} of at most {most} {unit}, and this job has one of {needed}"
        return ""
