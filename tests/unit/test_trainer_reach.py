"""A run whose loss reaches nothing that is trained is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.layer_outputs import captured, chosen_layers
from kdmesh.models.packing import pack
from kdmesh_trainer.builders import layers
from kdmesh_trainer.config import TrainerConfig
from tests.support.sequences import random_sequences
from tests.support.tiny_models import FAMILIES, VOCABULARY_SIZE, TinyModels


def config(student: str, *, highest: int = 1, kd_weight: float = 0, **keys: Any) -> TrainerConfig:
    pairs = {"pairs": {highest: 1}, "weight": 1}
    return TrainerConfig.model_validate(
        {
            "output": "run",
            "steps": 1,
            "student": {"model": student, **keys},
            "objective": {"name": "distill", "layers": pairs, "kd_weight": kd_weight},
            "teacher": {"addresses": ["localhost:1"]},
            "data": {"train": {"format": "chat", "path": "chats.jsonl"}},
        }
    )


def with_gradient(lm: PreTrainedModel, *, highest: int) -> set[str]:
    """Names of the parameters that autograd finds below a layer's output."""
    with captured(chosen_layers(lm, [highest])) as outputs:
        hidden_states_TD(lm, pack(random_sequences((9, 5), vocabulary_size=VOCABULARY_SIZE, seed=0)))
    outputs[highest].square().sum().backward()
    return {name for name, parameter in lm.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("family", "highest", "ties"),
    [*((family, 1, False) for family in FAMILIES), ("qwen3", 1, True), ("qwen3", 2, False), ("lfm2", 2, True)],
)
def test_what_is_called_reached_is_what_autograd_reaches(
    tiny_models: TinyModels, family: str, highest: int, ties: bool
) -> None:
    path = tiny_models.path(family, seed=1, tie_word_embeddings=ties)
    lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
    reached = {id(parameter) for parameter in layers.reached(lm, highest=highest)}
    found = {name for name, parameter in lm.named_parameters() if id(parameter) in reached}
    by_autograd = with_gradient(lm, highest=highest)
    assert by_autograd <= found
    assert not {name for name in found - by_autograd if ".experts." not in name}  # some of which no token came to


@pytest.mark.parametrize(
    "keys",
    [
        {"freeze": ["model.embed_tokens", "model.layers.0"]},
        {"freeze": ["model.embed_tokens", "model.layers"]},
        {"lora": {"target_modules": ["layers.1.mlp.down_proj"]}},
    ],
)
def test_a_student_that_trains_nothing_below_the_layers_that_alone_are_compared_is_refused(
    tiny_models: TinyModels, keys: dict[str, Any]
) -> None:
    student = str(tiny_models.path("qwen3", seed=1))
    with pytest.raises(ConfigError, match=f"student.{next(iter(keys))} trains nothing that .* is layer 1 and"):
        layers.refuse_unreached(config(student, **keys))
    layers.refuse_unreached(config(student, kd_weight=1, **keys))


@pytest.mark.parametrize(
    ("highest", "keys"),
    [
        (1, {}),
        (1, {"freeze": ["model.embed_tokens"]}),
        (1, {"freeze": ["model.layers"]}),
        (2, {"freeze": ["model.embed_tokens", "model.layers.0"]}),
        (1, {"lora": {}}),
        (2, {"lora": {"target_modules": ["layers.1.mlp.down_proj"]}}),
    ],
)
def test_a_student_that_trains_some_of_it_is_not(tiny_models: TinyModels, highest: int, keys: dict[str, Any]) -> None:
    layers.refuse_unreached(config(str(tiny_models.path("qwen3", seed=1)), highest=highest, **keys))
