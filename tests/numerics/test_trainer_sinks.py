"""Students with attention sinks are trained, kept, adapted and frozen as others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdmesh.models.body import load_causal_lm
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.student.lora import add_adapter
from kdmesh_trainer.student.weights import weights_of
from tests.support.tiny_models import TinyModels
from tests.support.trainer_ranks import run_ranks

RUNS = "tests.support.trainer_runs"
SINKS = "model.layers.0.self_attn.sinks"


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": {"name": "muon"}, "frozen": [SINKS]},
        pytest.param({"checkpointed_every": 1, "offloads": True}, marks=pytest.mark.slow),
        pytest.param({"lora": {"rank": 4, "dropout": 0.1}}, marks=pytest.mark.slow),
        pytest.param({"spreads_head": True}, marks=pytest.mark.slow),
    ],
    ids=["muon and frozen sinks", "checkpointed and offloaded", "lora", "spread head"],
)
def test_a_run_that_goes_on_has_exactly_the_losses_of_one_that_was_not_interrupted(
    tiny_models: TinyModels, tmp_path: Path, options: dict[str, Any]
) -> None:
    arguments = {
        "student": str(tiny_models.path("gpt_oss", seed=1)),
        "teacher": str(tiny_models.path("granite_swa", seed=2)),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": 4,
        "compute_dtype": "bfloat16",
        **options,
    }
    run_ranks(f"{RUNS}:train", ranks=2, **arguments, until=2, save_at=2)
    both = run_ranks(f"{RUNS}:train_rest_and_whole", ranks=2, **arguments, until=4, other=str(tmp_path / "other"))[0]
    assert both["first"] == 2
    assert both["rest"] == both["whole"][2:]


def test_an_adapter_of_all_linear_modules_is_on_the_attention_alone(tiny_models: TinyModels) -> None:
    lm = load_causal_lm(tiny_models.path("gpt_oss", seed=1), torch.float32, torch.device("cpu"))
    adapter = add_adapter(lm, LoraConfig(target_modules="all-linear"), seed=0)
    assert {name.rsplit(".", 1)[1] for name in adapter.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any(p.requires_grad for name, p in lm.named_parameters() if name.endswith("sinks"))
    assert weights_of(lm, adapter).keys() == set(AutoModelForCausalLM.from_config(lm.config).state_dict())
