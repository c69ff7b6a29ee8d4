"""Says which images a dataset may have."""

from __future__ import annotations

from pathlib import Path

from kdmesh.chats.image_files import ImageFiles, ImageRules
from kdmesh_trainer.sections.data_config import ImagesConfig

_MIB = 2**20


def dataset_images(cfg: ImagesConfig, directory: Path | None) -> ImageFiles:
    """Where the images of a dataset come from.

    Args:
        directory: of the dataset; None: it has none, so that paths need `cfg.root`.
    """
    return ImageFiles(
        ImageRules(
            root=directory if cfg.root is None else cfg.root,
            allow_urls=cfg.allow_urls,
            max_bytes=int(cfg.max_mib * _MIB),
            max_pixels=cfg.max_pixels,
            root_key="data.images.root",
            why_no_urls="data.images.allow_urls is false",
        )
    )
