"""What a server takes of images."""

from __future__ import annotations

from pydantic import Field, model_validator

from kdmesh.config import StrictModel

_MIB = 2**20


class ImagesConfig(StrictModel):
    """Images that clients bring, for a model that reads them."""

    memory_mib: float = Field(256, gt=0)
    """Memory for encoded images, so that one that comes again need not travel; those unused longest make place."""

    max_image_mib: float = Field(8, gt=0, le=15)
    """Largest encoded image; it must fit in one message."""

    max_image_pixels: int = Field(2**24, ge=1, le=2**28)
    """Most pixels of an image, width times height, before the model's processor scales it."""

    @property
    def memory_bytes(self) -> int:
        """memory_mib in bytes."""
        return int(self.memory_mib * _MIB)

    @property
    def max_image_bytes(self) -> int:
        """max_image_mib in bytes."""
        return int(self.max_image_mib * _MIB)

    @model_validator(mode="after")
    def _one_fits(self) -> ImagesConfig:
        if self.memory_mib < self.max_image_mib:
            raise ValueError(
                f"memory_mib ({self.memory_mib:g}) must hold the largest image, max_image_mib ({self.max_image_mib:g})"
            )
        return self
