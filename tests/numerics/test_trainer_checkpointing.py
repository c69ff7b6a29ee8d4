"""Layers that keep only their inputs for the backward pass have the same gradient, and keep less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.student.weights import whole
from tests.support.tiny_models import HYBRIDS, TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

VOCABULARY_SIZE = 310
PLAN = [[[0, 1, 2], [3]], [[4, 5], [6, 7]]]  # rank -> micro-batches -> sequences
CHOICES = {"none": None, "half": 2, "all": 1}


def gradients(mesh: Mesh, *, student: str, teacher: str, output: str) -> None:
    """Writes every choice's whole gradient, and the bytes that the forward passes kept; runs on every rank."""
    sequences = random_sequences(8, seed=5, vocabulary_size=VOCABULARY_SIZE)
    local_teacher = LocalTeacher(Path(teacher))
    for name, every in CHOICES.items():
        model = build_student(
            Path(student),
            mesh,
            vocabulary_size=VOCABULARY_SIZE,
            compute_dtype=torch.float32,
            checkpointed_every=every,
            gather="micro_batch",
        )
        stepper = build_stepper(model, local_teacher, mesh, config=OptimizerConfig(), steps=1)
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            stepper.accumulate(step_batch(sequences, PLAN[mesh.rank], local_teacher))
        results = {name: whole(parameter.grad, None) for name, parameter in model.lm.named_parameters()}
        if mesh.is_first:
            save_file({**results, "kept": torch.tensor([kept])}, Path(output) / f"{name}.safetensors")


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "olmo_hybrid", "granitemoehybrid", "lfm2"])
def test_the_gradient_is_the_same_to_the_bit_and_less_is_kept(
    tiny_models: TinyModels, tmp_path: Path, family: str
) -> None:
    more = {"layer_types": HYBRIDS[family]["layer_types"] * 2} if family in HYBRIDS else {}
    student = tiny_models.path(family, seed=1, num_hidden_layers=4, **more)
    teacher = tiny_models.path("qwen3", seed=2, vocab_size=320)
    target = "tests.numerics.test_trainer_checkpointing:gradients"
    run_ranks(target, ranks=2, student=str(student), teacher=str(teacher), output=str(tmp_path))
    none, half, full = (load_file(tmp_path / f"{name}.safetensors") for name in CHOICES)
    kept = [int(results.pop("kept")) for results in (none, half, full)]
    for results in (half, full):
        assert results.keys() == none.keys()
        assert all(torch.equal(results[name], gradient) for name, gradient in none.items())
    assert kept[0] > 1.3 * kept[1] > 1.3 * kept[2]
