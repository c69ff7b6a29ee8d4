"""Training and decoding mix no tensor of their device with one of the host, and ask the host for no value.

The device is `meta`, which stands for a GPU here: it refuses both, as it has no values.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from kdmesh.models.body import load_causal_lm
from kdmesh.models.decoding.decoder import Decoder, prepare_decoding
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.quantization_config import QuantizationConfig
from tests.support.lone_rank import mesh as mesh
from tests.support.lone_rank import on_device
from tests.support.tiny_models import FAMILIES, TinyModels
from tests.support.trainer_parts import (
    Layers,
    LocalTeacher,
    build_stepper,
    build_student,
    random_sequences,
    step_batch,
)

META = torch.device("meta")
VOCABULARY_SIZE = 310
SEQUENCES = random_sequences(6, seed=3, vocabulary_size=VOCABULARY_SIZE)
PLAN = [[0, 1], [2], [3, 4, 5]]


@pytest.fixture
def on_meta(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> Mesh:
    """One rank whose device is `meta`, which torch has no autocast for."""
    autocast = torch.autocast

    def without_meta(device_type: str, **options: Any) -> AbstractContextManager[object]:
        return nullcontext() if device_type == "meta" else cast(Any, autocast(device_type, **options))

    monkeypatch.setattr(torch, "autocast", without_meta)
    return on_device(mesh, META)


def take_steps(mesh: Mesh, student: Path, teacher: LocalTeacher, *, optimizer: str = "adamw", **how: Any) -> None:
    """Two steps but for their figures, where the host waits.

    Args:
        how: of build_student.
    """
    model = build_student(student, mesh, vocabulary_size=VOCABULARY_SIZE, **{"compute_dtype": torch.bfloat16, **how})
    config = OptimizerConfig.model_validate({"name": optimizer})
    stepper = build_stepper(model, teacher, mesh, config=config, steps=2)
    for group in stepper.optimizer.param_groups:
        group["fused"] = False  # a kernel that torch has for real devices
    for _ in range(2):
        stepper.accumulate(step_batch(SEQUENCES, PLAN, teacher))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None and parameter.grad.device == META for parameter in trained)
        clip_grad_norm_(trained, 1.0)
        stepper.optimizer.step()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stays_on_its_device(on_meta: Mesh, tiny_models: TinyModels, family: str) -> None:
    take_steps(on_meta, tiny_models.path(family, seed=1), LocalTeacher(tiny_models.path(seed=2)))


@pytest.mark.parametrize(
    "how",
    [
        {"compute_dtype": torch.float32},
        {"checkpointed_every": 1},
        {"frozen": ("model.layers.0",)},
        {"lora": LoraConfig(rank=4)},
        {"lora": LoraConfig(rank=4, use_dora=True)},
        {"lora": LoraConfig(rank=4, base="nf4")},
        {"quantization": QuantizationConfig(weights="int4", group_size=32)},
        {"quantization": QuantizationConfig(weights="fp8", activations="fp8")},
        {"optimizer": "muon"},
        {"layers": Layers(pairs={1: 1, 2: 2}, distance="cosine", teacher_width=32)},
    ],
    ids=lambda how: "-".join(how),
)
def test_every_option_stays_on_its_device(on_meta: Mesh, tiny_models: TinyModels, how: dict[str, Any]) -> None:
    teacher = LocalTeacher(tiny_models.path(seed=2), layers={1, 2} if "layers" in how else ())
    take_steps(on_meta, tiny_models.path(seed=1, hidden_size=64, head_dim=16), teacher, **how)


def test_experts_stay_on_their_device_with_muon(on_meta: Mesh, tiny_models: TinyModels) -> None:
    take_steps(on_meta, tiny_models.path("qwen3_moe", seed=1), LocalTeacher(tiny_models.path(seed=2)), optimizer="muon")


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_stays_on_its_device(tiny_models: TinyModels, family: str) -> None:
    lm = load_causal_lm(tiny_models.path(family), torch.bfloat16, torch.device("cpu"))
    prepare_decoding(lm)
    lm.to(META)
    with torch.inference_mode():
        decoder = Decoder(lm, tokens=1)
        decoder.join([np.arange(length, dtype=np.int32) for length in (5, 9)])
        decoder.fork(0)
        decoder.advance([1, 2, 3])
        decoder.leave(0)
        assert decoder.advance([1, 2]).device == META


def test_meta_refuses_what_a_gpu_refuses_or_waits_for() -> None:
    there = torch.ones(3, device=META)
    for refused in (lambda: there + torch.ones(3), lambda: there.sum().item(), lambda: there[there > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            refused()
