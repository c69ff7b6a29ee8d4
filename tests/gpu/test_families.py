"""Every family of models, and every option of a student, learns on a GPU as on a CPU, and the families decode there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

pytest.importorskip("pydantic")
pytest.importorskip("PIL")

from kdmesh.models.body import load_causal_lm
from kdmesh.models.decoding.decoder import prepare_decoding
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.quantization_config import QuantizationConfig
from tests.support.lone_rank import on_device
from tests.support.tiny_models import FAMILIES, TinyModels
from tests.support.tiny_models import tiny_models as tiny_models
from tests.support.trainer_parts import (
    Layers,
    LocalTeacher,
    build_stepper,
    build_student,
    random_sequences,
    step_batch,
)

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
VOCABULARY_SIZE = 310
SEQUENCES = random_sequences(6, seed=3, vocabulary_size=VOCABULARY_SIZE)
PLAN = [[0, 1], [2], [3, 4, 5]]
OPTIONS: Mapping[str, dict[str, Any]] = {
    "checkpointed": {"checkpointed_every": 1},
    "frozen": {"frozen": ("model.layers.0",)},
    "lora": {"lora": LoraConfig(rank=4)},
    "dora": {"lora": LoraConfig(rank=4, use_dora=True)},
    "nf4": {"lora": LoraConfig(rank=4, base="nf4")},
    "int4": {"quantization": QuantizationConfig(weights="int4", group_size=32)},
    "int8": {"quantization": QuantizationConfig(weights="int8", activations="int8")},
    "fp8": {"quantization": QuantizationConfig(weights="fp8", activations="fp8")},
    "muon": {"optimizer": "muon"},
    "layers": {"layers": Layers(pairs={1: 1, 2: 2}, distance="cosine", teacher_width=32)},
}


@pytest.fixture(scope="module")
def mesh(device: torch.device) -> Iterator[Mesh]:
    with joined("cpu" if device.type == "cpu" else "cuda", longest_wait_s=60) as mesh:
        yield mesh


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions, too, which torch lets a GPU compute in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def known(family: str) -> str:
    """`family`, where this transformers has it."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    return family


def trained(
    mesh: Mesh, student: Path, teacher: Path, *, optimizer: str = "adamw", **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a batch, its whole gradient, and what a step makes of the parameters, as one tensor each.

    Args:
        how: of build_student.
    """
    scorer = LocalTeacher(teacher, layers={1, 2} if "layers" in how else ())
    model = build_student(student, mesh, vocabulary_size=VOCABULARY_SIZE, **{"compute_dtype": torch.float32, **how})
    config = OptimizerConfig.model_validate({"name": optimizer, "learning_rate": 1e-3, "warmup_steps": 0})
    stepper = build_stepper(model, scorer, mesh, config=config, steps=2)
    totals, _ = stepper.accumulate(step_batch(SEQUENCES, PLAN, scorer)).over_all_ranks()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.cat([_on_cpu(parameter.grad) for parameter in learning])
    stepper.update(step_batch(SEQUENCES, PLAN, scorer))
    return torch.tensor(totals.loss), gradient, torch.cat([_on_cpu(parameter) for parameter in learning])


def _on_cpu(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.detach().flatten().cpu()


def check_as_on_a_cpu(mesh: Mesh, device: torch.device, student: Path, teacher: Path, **how: Any) -> None:
    loss, gradient, parameters = trained(on_device(mesh, device), student, teacher, **how)
    expected_loss, expected_gradient, expected_parameters = trained(on_device(mesh, CPU), student, teacher, **how)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()
    # Where a gradient is next to nothing AdamW takes a whole step in a direction that rounding may turn.
    assert (parameters - expected_parameters).norm() < 1e-3 * expected_parameters.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_as_on_a_cpu(mesh: Mesh, gpu: torch.device, tiny_models: TinyModels, family: str) -> None:
    check_as_on_a_cpu(mesh, gpu, tiny_models.path(known(family), seed=1), tiny_models.path(seed=2))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_learns_as_on_a_cpu(mesh: Mesh, gpu: torch.device, tiny_models: TinyModels, option: str) -> None:
    if "lora" in OPTIONS[option]:
        pytest.importorskip("peft")
    student = tiny_models.path(seed=1, hidden_size=64, head_dim=16)
    check_as_on_a_cpu(mesh, gpu, student, tiny_models.path(seed=2), **OPTIONS[option])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_in_bfloat16(mesh: Mesh, gpu: torch.device, tiny_models: TinyModels, family: str) -> None:
    student, teacher = tiny_models.path(known(family), seed=1), tiny_models.path(seed=2)
    loss, gradient, _ = trained(on_device(mesh, gpu), student, teacher, compute_dtype=torch.bfloat16)
    expected, _, _ = trained(on_device(mesh, CPU), student, teacher)
    torch.testing.assert_close(loss, expected, rtol=5e-2, atol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_it_computes_whole_sequences(
    gpu: torch.device, tiny_models: TinyModels, family: str
) -> None:
    prepare_decoding(load_causal_lm(tiny_models.path(known(family)), torch.float32, gpu))  # which compares both
