"""What layers of any supported family give, and which of them there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdmesh.errors import ConfigError
from kdmesh.models.body import hidden_states_TD, load_causal_lm
from kdmesh.models.layer_outputs import captured, chosen_layers, num_layers, numbered_layers
from kdmesh.models.packing import pack
from tests.support.sequences import random_sequences
from tests.support.tiny_models import FAMILIES, VOCABULARY_SIZE, TinyModels
from tests.support.tiny_vision import TinyVisionModels

_NORMS = ("norm", "final_layernorm", "ln_f", "norm_f", "embedding_norm")


def last_output_is_before_the_norm(path: Path) -> None:
    lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
    layers = numbered_layers(lm)
    number = num_layers(lm.config)
    assert list(layers) == list(range(1, number + 1))
    packed = pack(random_sequences((9, 5), vocabulary_size=VOCABULARY_SIZE, seed=0))
    with torch.no_grad():
        with captured(layers) as outputs:
            hidden_TD = hidden_states_TD(lm, packed)
        decoder = lm.get_decoder()
        norm = next(getattr(decoder, name) for name in _NORMS if hasattr(decoder, name))
        assert torch.equal(norm(outputs[number]), hidden_TD)
        assert outputs[1].shape == hidden_TD.shape
        outputs.clear()
        hidden_states_TD(lm, packed)
        assert not outputs  # nothing of it stays


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_of_every_family_gives_what_its_norm_reads(tiny_models: TinyModels, family: str) -> None:
    last_output_is_before_the_norm(tiny_models.path(family))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_layers_of_a_vision_tower_are_not_counted(tiny_vision: TinyVisionModels, family: str) -> None:
    last_output_is_before_the_norm(tiny_vision.path(family))


def test_layers_that_are_none_are_refused(tiny_models: TinyModels) -> None:
    lm = load_causal_lm(tiny_models.path(), torch.float32, torch.device("cpu"))
    assert list(chosen_layers(lm, {2, 1})) == [1, 2]
    for number in (0, 3):
        with pytest.raises(ConfigError, match=f"has no decoder layer {number}; it has 2 that are numbered"):
            chosen_layers(lm, [1, number])
