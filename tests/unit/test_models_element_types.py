"""The element type of each tensor, against what transformers loads."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from kdmesh.models.element_types import element_types
from tests.support import tiny_vision
from tests.support.tiny_models import FAMILIES, TinyModels
from tests.support.tiny_vision import TinyVisionModels


def check(narrow: PreTrainedModel, wide: PreTrainedModel) -> None:
    """`wide` is the same model in float32, as a trainer has it."""
    loaded = {name: tensor.dtype for name, tensor in narrow.state_dict().items() if tensor.is_floating_point()}
    assert torch.bfloat16 in loaded.values()
    config = wide.config.to_dict()
    assert element_types(wide, loaded, torch.bfloat16) == loaded
    assert wide.config.to_dict() == config


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_have_the_types_that_transformers_loads_them_in(tiny_models: TinyModels, family: str) -> None:
    path = tiny_models.path(family, dtype=torch.bfloat16)
    check(*(AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)))


@pytest.mark.parametrize("family", tiny_vision.FAMILIES)
def test_so_have_those_of_models_that_read_images(tiny_vision: TinyVisionModels, family: str) -> None:
    path = tiny_vision.path(family, dtype=torch.bfloat16)
    dtypes = torch.bfloat16, torch.float32
    check(*(AutoModelForImageTextToText.from_pretrained(path, dtype=dtype) for dtype in dtypes))
