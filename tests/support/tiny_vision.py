"""Tiny random models that read images, with tokenizer and image processor, and images for them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kdmesh.images import describe_image
from kdmesh.models.images.reader import ImageReader, load_image_reader
from kdmesh.types import PlacedImage, TokenSequence
from tests.support.row_families import ROW_FAMILIES
from tests.support.tiny_models import HYBRIDS as HYBRID_TEXTS
from tests.support.tiny_vision_tokens import (
    IMAGE_TOKEN,
    ROW_IMAGE_TOKEN,
    ROW_SPECIAL,
    TINY_TEXT,
    VISION_END,
    VISION_START,
    VOCABULARY_SIZE,
    save_row_tokenizer,
    save_tokenizer,
)

PATCH = 4
MERGE = 2

_TEXT = {
    **TINY_TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
_VISION = {
    "depth": 2,
    "num_heads": 2,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "initializer_range": 0.15,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}
"""Model type -> what its vision tower is told beside the rest."""

_QWEN3_5_TOWER = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 64}
HYBRIDS: dict[str, dict[str, Any]] = {
    family: HYBRID_TEXTS[f"{family}_text"] | {"head_dim": 32}  # a quarter of which turns, by three axes
    for family in ("qwen3_5", "qwen3_5_moe")
}
"""Model type -> what its language model is told beside the rest. Each is one of FAMILIES too."""

FAMILIES |= dict.fromkeys(HYBRIDS, _QWEN3_5_TOWER)


class TinyVisionModels:
    """Makes each directory once and keeps it; callers must not change what they are given."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(
        self,
        family: str = "qwen2_5_vl",
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        max_pixels: int = 4096,
        patch: int = PATCH,
    ) -> Path:
        """Directory of a random model of `family`.

        Args:
            max_pixels: larger images are scaled down to it.
            patch: width of a patch in pixels; SGLang's Qwen2.5-VL knows 14 only.
        """
        path = self._root / f"{family}-{seed}-{dtype}-{max_pixels}-{patch}"
        if not path.exists():
            save_model(path, family, seed=seed, dtype=dtype, patch=patch)
            if family in ROW_FAMILIES:
                save_row_tokenizer(path)
                ROW_FAMILIES[family].processor().save_pretrained(path)
            else:
                save_tokenizer(path)
                save_image_processor(path, max_pixels=max_pixels, patch=patch)
        return path


def save_model(path: Path, family: str, *, seed: int, dtype: torch.dtype, patch: int = PATCH) -> None:
    """Writes a random model of `family` to `path`; every parameter is random."""
    config = _row_config(family) if family in ROW_FAMILIES else _axes_config(family, patch=patch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(path)


def _row_config(family: str) -> PretrainedConfig:
    made = ROW_FAMILIES[family]
    return AutoConfig.for_model(
        family, text_config=made.text, image_token_id=ROW_IMAGE_TOKEN, tie_word_embeddings=False, **made.config
    )


def _axes_config(family: str, *, patch: int) -> PretrainedConfig:
    return AutoConfig.for_model(
        family,
        text_config=_TEXT | HYBRIDS.get(family, {}),
        vision_config=_VISION | FAMILIES[family] | {"patch_size": patch, "window_size": 4 * patch},
        image_token_id=IMAGE_TOKEN,
        video_token_id=VOCABULARY_SIZE - 1,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )


def save_image_processor(path: Path, *, max_pixels: int, patch: int = PATCH) -> None:
    """Writes the image processor that fits the models to `path`."""
    Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": (patch * MERGE) ** 2, "longest_edge": max_pixels},
    ).save_pretrained(path)


def png(width: int, height: int, *, seed: int) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def reader_of(path: Path) -> ImageReader:
    """The image reader of a model."""
    reader = load_image_reader(path)
    assert reader is not None
    return reader


def vision_sequence(reader: ImageReader, *parts: int | bytes, seed: int, rows: int = 4) -> TokenSequence:
    """Random text tokens, as many as each number says, with an image for each `bytes`; the last rows are wanted."""
    draw = np.random.default_rng(seed)
    ids, images = list[int](), []
    for part in parts:
        if isinstance(part, int):
            ids.extend(draw.integers(len(ROW_SPECIAL), VOCABULARY_SIZE - 1, part).tolist())
            continue
        image = describe_image(part)
        own = reader.tokens(image.width, image.height).tolist()
        ids.extend([] if reader.start_id is None else [VISION_START])
        images.append(PlacedImage(digest=image.digest, first_token=len(ids), num_tokens=len(own), image=image))
        ids.extend(own if reader.start_id is None else [*own, VISION_END])
    return TokenSequence(
        token_ids=np.array(ids, np.int32),
        positions=np.arange(len(ids) - 1 - rows, len(ids) - 1, dtype=np.int32),
        images=tuple(images),
    )


@pytest.fixture(scope="session")
def tiny_vision(tmp_path_factory: pytest.TempPathFactory) -> TinyVisionModels:
    """Directories of tiny random models that read images."""
    return TinyVisionModels(tmp_path_factory.mktemp("tiny_vision"))
