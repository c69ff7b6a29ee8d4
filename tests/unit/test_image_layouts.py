"""What stands for an image is what transformers' own processor of texts and images writes."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.models.pixtral import image_processing_pil_pixtral as pil_pixtral

from kdmesh.errors import ConfigError, InvalidRequest
from kdmesh.images import describe_image, expand_images
from kdmesh.models.body import load_causal_lm
from kdmesh.models.images.families import AXES_CLASSES, ROW_CLASSES
from kdmesh.models.images.reader import load_image_reader
from kdmesh.sglang.verified_images import images_refusal
from tests.support.row_families import PATCH, ROW_FAMILIES, TILE
from tests.support.tiny_vision import TinyVisionModels, png, reader_of
from tests.support.tiny_vision_tokens import ROW_IMAGE_TOKEN

# Width and height in pixels: one tile, tiles in a row, in a column and in a square, sides that nothing divides.
SIZES = [(TILE, TILE), (9, 7), (64, 16), (16, 64), (64, 64), (100, 41), (41, 100), (33, 31), (200, 199), (7, 90)]


def written_by_transformers(path: Path, family: str, width: int, height: int) -> list[int]:
    """Without its constructor, for which some processors need packages that have to do with videos alone."""
    made = ROW_FAMILIES[family]
    module, name = made.writer.split(".")
    # Not from the top of transformers, which hides a class that it thinks lacks a package.
    writer: Any = getattr(import_module(f"transformers.models.{module}.processing_{module}"), name)
    processor = writer.__new__(writer)
    image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    vars(processor).update(made.settings, image_token="<image>", image_processor=image_processor)
    read = image_processor(images=[PIL.Image.new("RGB", (width, height))], return_tensors="pt", **made.told)
    text = processor.replace_image_token({name: _plain(value) for name, value in read.items()}, image_idx=0)
    # Between words, so that what is written at its ends is split into tokens as it is in a chat.
    ids: list[int] = AutoTokenizer.from_pretrained(path)(f"a{text}b", add_special_tokens=False)["input_ids"]
    return ids[1:-1]


def _plain(value: Any) -> Any:
    is_table = isinstance(value, torch.Tensor) and not value.is_floating_point()
    return value.tolist() if is_table else value


def test_every_family_is_tried() -> None:
    assert ROW_FAMILIES.keys() == ROW_CLASSES.keys()


@pytest.mark.parametrize("family", ROW_FAMILIES)
def test_tokens_are_those_of_the_model_s_own_processor(
    tiny_vision: TinyVisionModels, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pixtral's would take a function from a module that needs torchvision, and Pillow's has the same one.
    monkeypatch.setitem(sys.modules, pil_pixtral.__name__.replace("_pil", ""), pil_pixtral)
    path = tiny_vision.path(family)
    reader = reader_of(path)
    numbers = set()
    for width, height in SIZES:
        own = reader.tokens(width, height)
        assert own.tolist() == written_by_transformers(path, family, width, height), (width, height)
        numbers.add(len(own))
    assert len(numbers) > 2 or family == "llava"


@pytest.mark.parametrize("family", ROW_FAMILIES)
def test_the_vision_tower_gives_a_row_for_every_image_token(tiny_vision: TinyVisionModels, family: str) -> None:
    path = tiny_vision.path(family)
    reader, model = reader_of(path), load_causal_lm(path, torch.float32, torch.device("cpu"))
    for number, (width, height) in enumerate(SIZES):
        inputs = reader.inputs([describe_image(png(width, height, seed=number))])
        with torch.no_grad():
            rows = model.base_model.get_image_features(**inputs, return_dict=True).pooler_output
        there = int((reader.tokens(width, height) == ROW_IMAGE_TOKEN).sum())
        assert sum(row.shape[:-1].numel() for row in rows) == there, (width, height)


@pytest.mark.parametrize("family", ROW_FAMILIES)
def test_images_one_right_behind_the_other_keep_their_own_tokens(tiny_vision: TinyVisionModels, family: str) -> None:
    reader = reader_of(tiny_vision.path(family))
    images = [describe_image(png(*size, seed=1)) for size in ((40, 24), (16, 64))]
    ids = np.array([20, ROW_IMAGE_TOKEN, ROW_IMAGE_TOKEN, 21, 22], np.int32)
    expanded, positions, placed = expand_images(ids, np.array([3], np.int32), images, reader)
    first, second = (reader.tokens(image.width, image.height).tolist() for image in images)
    assert expanded.tolist() == [20, *first, *second, 21, 22]
    assert expanded[positions].tolist() == [21]
    assert [(one.first_token, one.end) for one in placed] == [(1, 1 + len(first)), (1 + len(first), len(expanded) - 2)]


def test_models_that_make_other_numbers_of_tokens_are_told_apart(tiny_vision: TinyVisionModels) -> None:
    names = {reader_of(tiny_vision.path(family)).expansion for family in ROW_FAMILIES}
    assert len(names) == len(ROW_FAMILIES)
    assert reader_of(tiny_vision.path("internvl", seed=2)).expansion in names


def test_an_image_that_the_model_cannot_read_is_refused(tiny_vision: TinyVisionModels) -> None:
    reader = reader_of(tiny_vision.path("mistral3"))
    side = 2 * PATCH
    with pytest.raises(InvalidRequest, match=rf"of {side} x {side} pixels cannot be read: .* more than {side} pixels"):
        reader.tokens(side, side)


def test_a_tower_that_nobody_knows_is_refused(tiny_vision: TinyVisionModels) -> None:
    path = tiny_vision.path("llava")
    config = AutoConfig.from_pretrained(path)
    config.vision_config.model_type = "dinov2"
    with pytest.raises(ConfigError, match="vision tower of type dinov2 are not known; known are clip_vision"):
        load_image_reader(path, config)


def test_sglang_is_refused_where_nobody_has_compared_what_it_sees(tmp_path: Path) -> None:
    for told in ("", "[]", "{}", '{"model_type": []}', *(f'{{"model_type": "{name}"}}' for name in AXES_CLASSES)):
        (tmp_path / "config.json").write_text(told)
        assert images_refusal(tmp_path) is None
    for name in ROW_CLASSES:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{name}"}}')
        refusal = images_refusal(tmp_path)
        assert refusal is not None
        assert f"{tmp_path} is of model type {name}, whose images kdmesh has not verified in SGLang" in refusal
        assert f"one of {', '.join(AXES_CLASSES)}" in refusal
