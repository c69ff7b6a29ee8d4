"""A checkpoint belongs to what its run was configured with, and to that alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdmesh.errors import CheckpointError
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.saved_config import COMPLETE, STATE, configured_identity, refuse_other_run


def identity_of(**student: Any) -> dict[str, str]:
    """What a checkpoint of a run with such a student would say of it."""
    return identity_of_run(student={"model": "student", **student})


def identity_of_run(**sections: Any) -> dict[str, str]:
    """The same of a run with other sections."""
    tree = {
        "output": "run",
        "student": {"model": "student"},
        "objective": {"name": "sft"},
        "data": {"train": {"format": "chat", "path": "chats.jsonl"}},
        "steps": 1,
    }
    return configured_identity(TrainerConfig.model_validate(tree | sections))


def lora_of(**keys: Any) -> dict[str, Any]:
    """The same of its adapter."""
    told: dict[str, Any] = json.loads(identity_of(lora={"rank": 4, **keys})["student.lora"])
    return told


def test_a_checkpoint_belongs_to_what_was_frozen_in_any_order() -> None:
    told = [
        identity_of(freeze=names)["student.freeze"] for names in (["lm_head", "model.norm"], ["model.norm", "lm_head"])
    ]
    assert told == ["lm_head, model.norm"] * 2
    assert "student.freeze" not in identity_of()


def test_a_checkpoint_belongs_to_what_was_rounded_and_how() -> None:
    told = [identity_of(quantization={"weights": "int4", "group_size": size}) for size in (32, 64)]
    assert told[0] != told[1]
    assert json.loads(told[0]["student.quantization"])["group_size"] == 32
    assert "student.quantization" not in identity_of()


def test_a_checkpoint_belongs_to_an_adapter_of_the_same_scale_and_base() -> None:
    assert lora_of() == lora_of(use_rslora=False, base="full")
    assert lora_of(use_rslora=True)["use_rslora"] is True
    assert lora_of(base="nf4")["base"] == "nf4"


def test_a_checkpoint_belongs_to_pairs_of_layers_in_any_order() -> None:
    def objective_of(**keys: Any) -> str:
        told = {"objective": {"name": "distill", **keys}, "teacher": {"addresses": ["localhost:1"]}}
        return identity_of_run(**told)["objective"]

    assert json.loads(objective_of())["layers"] is None
    one, same, other = (
        objective_of(layers={"pairs": pairs, "weight": 1}) for pairs in ({1: 2, 3: 4}, {3: 4, 1: 2}, {1: 2, 3: 5})
    )
    assert one == same != other


@pytest.mark.parametrize(("key", "is_explained"), [("data.train (digest)", True), ("seed", False)])
def test_a_checkpoint_of_other_data_says_that_they_may_only_be_read_otherwise(
    tmp_path: Path, key: str, is_explained: bool
) -> None:
    checkpoint = tmp_path / f"{COMPLETE}1"
    checkpoint.mkdir()
    (checkpoint / STATE).write_text(json.dumps({"next_step": 1, "world_size": 1, "identity": {key: "a"}}))
    with pytest.raises(CheckpointError) as refused:
        refuse_other_run(checkpoint, {key: "b"}, steps=2)
    assert f"{key} is b now and was a" in str(refused.value)
    assert ("`data.max_tokens`" in str(refused.value)) is is_explained
