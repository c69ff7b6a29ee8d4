"""Which decoder layers are gathered together."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kdmesh_trainer.student.model import decoder_layers, units


def small_lm(num_layers: int) -> Qwen3ForCausalLM:
    with torch.device("meta"):
        return Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=num_layers,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                vocab_size=64,
            )
        )


@pytest.mark.parametrize(
    ("layers_per_unit", "expected"), [(0.5, [1] * 7), (1, [1] * 7), (1.5, [2, 2, 2, 1]), (3, [3, 3, 1]), (100, [7])]
)
def test_layers_are_joined_until_they_are_large(layers_per_unit: float, expected: list[int]) -> None:
    lm = small_lm(7)
    size = sum(parameter.numel() for parameter in decoder_layers(lm)[0].parameters())
    found = units(lm, int(layers_per_unit * size))
    assert [len(unit) for unit in found] == expected
    assert [layer for unit in found for layer in unit] == decoder_layers(lm)


def test_frozen_layers_are_not_joined_with_others() -> None:
    lm = small_lm(5)
    for layer in decoder_layers(lm)[1:3]:
        layer.requires_grad_(False)
    assert [len(unit) for unit in units(lm, 10**6)] == [1, 2, 2]
