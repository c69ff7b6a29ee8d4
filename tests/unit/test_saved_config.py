"""A checkpoint belongs to what its run was configured with, and to that alone."""

from __future__ import annotations

import json
from typing import Any

from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.saved_config import configured_identity


def lora_of(**keys: Any) -> dict[str, Any]:
    """What a checkpoint of a run with this adapter would say of it."""
    cfg = TrainerConfig.model_validate(
        {
            "output": "run",
            "student": {"model": "student", "lora": {"rank": 4, **keys}},
            "objective": {"name": "sft"},
            "data": {"train": {"format": "chat", "path": "chats.jsonl"}},
            "steps": 1,
        }
    )
    told: dict[str, Any] = json.loads(configured_identity(cfg)["student.lora"])
    return told


def test_a_run_begun_before_adapters_could_be_scaled_otherwise_goes_on() -> None:
    assert "use_rslora" not in lora_of()
    assert "use_rslora" not in lora_of(use_rslora=False)
    assert lora_of(use_rslora=True)["use_rslora"] is True
