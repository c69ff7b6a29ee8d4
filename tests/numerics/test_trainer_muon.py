"""Muon moves whole matrices as the textbook says, however their parts lie, and goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.optimization import muon
from kdmesh_trainer.optimization.muon import orthogonal
from kdmesh_trainer.optimization.optimizer import optimizer_over, set_learning_rate
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.student.model import release
from kdmesh_trainer.student.weights import whole
from tests.support.killed_runs import check_exact_continuation
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import build_student, in_copies
from tests.support.trainer_ranks import run_ranks

HERE = "tests.numerics.test_trainer_muon"
RUNS = "tests.support.trainer_runs"
Array = npt.NDArray[np.float64]

STEPS = 3
RATES = (0.02, 0.03, 0.01)
CONFIG = OptimizerConfig(name="muon", momentum=0.9, weight_decay=0.1, epsilon=1e-3)


def orthogonalised(matrix: Array) -> Array:
    """By singular values: five times s <- 3.4445 s - 4.7750 s^3 + 2.0315 s^5, from s / the matrix's norm on."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return np.asarray((left * values) @ right)


@pytest.mark.parametrize("shape", [(24, 24), (7, 40), (40, 7), (1, 9), (64, 33)])
def test_singular_values_go_where_the_polynomial_takes_them(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(3).standard_normal(shape)
    found = orthogonal(torch.from_numpy(matrix).float())
    assert found.dtype is torch.float32
    np.testing.assert_allclose(found.numpy(), orthogonalised(matrix), rtol=1e-3, atol=2e-5)
    values = np.linalg.svd(orthogonalised(np.random.default_rng(4).standard_normal((8, 32))), compute_uv=False)
    assert ((values > 0.5) & (values < 1.3)).all()
    assert not orthogonal(torch.zeros(shape)).any()


def gradient(name: str, shape: tuple[int, ...], step: int) -> Array:
    seed = [*name.encode(), step]
    return np.random.default_rng(seed).standard_normal(shape) * 0.1


def updated(
    mesh: Mesh, *, student: str, output: str, spreads_head: bool = False, shard_ranks: int | None = None
) -> None:
    """Writes the student's weights after some steps with given gradients; runs on every rank."""
    mesh = in_copies(mesh, shard_ranks=shard_ranks)
    model = build_student(
        Path(student),
        mesh,
        vocabulary_size=310,
        compute_dtype=torch.float32,
        gather="micro_batch" if mesh.world_size > 1 else "auto",
        spreads_head=spreads_head,
    )
    optimizer = optimizer_over(model, CONFIG)
    for step, rate in enumerate(RATES):
        for name, parameter in model.lm.named_parameters():
            whole_gradient = torch.from_numpy(gradient(name, tuple(parameter.shape), step)).float()
            parameter.grad = _like(whole_gradient, parameter)
        set_learning_rate(optimizer, rate)
        optimizer.step()
    release(model)
    weights = {name: whole(parameter, None).clone() for name, parameter in model.lm.named_parameters()}
    if mesh.is_first:
        save_file(weights, Path(output))


def _like(value: Tensor, shard: Tensor) -> Tensor:
    return distribute_tensor(value, shard.device_mesh, shard.placements) if isinstance(shard, DTensor) else value


def textbook(student: Path) -> dict[str, Array]:
    """In float64: Muon for matrices of the layers, AdamW for the rest, each from its paper."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    result = {}
    for name, parameter in model.named_parameters():
        weight: Array = parameter.detach().numpy().copy()
        # Also those of each expert or head, in one tensor.
        is_vector = weight.ndim == 1 or name.endswith("bias") or "norm" in name
        decay = 0.0 if is_vector else 0.1
        momentum, first, second = (np.zeros_like(weight) for _ in range(3))
        for step, rate in enumerate(RATES):
            slope = gradient(name, weight.shape, step)
            weight *= 1 - rate * decay
            if weight.ndim == 2 and not is_vector and ".layers." in name:
                momentum = 0.9 * momentum + 0.1 * slope
                direction = orthogonalised(0.1 * slope + 0.9 * momentum)
                weight -= rate * 0.2 * np.sqrt(max(weight.shape)) * direction
            else:
                first, second = 0.9 * first + 0.1 * slope, 0.95 * second + 0.05 * slope**2
                ends = 1 - 0.9 ** (step + 1), 1 - 0.95 ** (step + 1)
                weight -= rate * (first / ends[0]) / (np.sqrt(second / ends[1]) + 1e-3)
        result[name] = weight
    return result


@pytest.mark.parametrize(
    ("family", "is_tied", "ranks", "options"),
    [
        ("qwen3", True, 1, {}),
        ("qwen3", False, 2, {}),
        ("qwen3", True, 2, {"spreads_head": True}),
        ("gpt_oss", False, 1, {}),
        ("cohere", True, 1, {}),
        pytest.param("qwen3", False, 3, {}, marks=pytest.mark.slow),
        pytest.param("qwen3", True, 4, {"shard_ranks": 2}, marks=pytest.mark.slow),
    ],
)
def test_weights_are_the_textbook_s_wherever_their_parts_lie(
    tiny_models: TinyModels, tmp_path: Path, family: str, is_tied: bool, ranks: int, options: dict[str, Any]
) -> None:
    student = tiny_models.path(family, seed=1, tie_word_embeddings=is_tied)
    output = tmp_path / "weights"
    run_ranks(f"{HERE}:updated", ranks=ranks, student=str(student), output=str(output), **options)
    found, expected = load_file(output), textbook(student)
    before = dict(AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        moved = np.linalg.norm(weight - before[name].detach().numpy())
        error = np.linalg.norm(found[name].numpy() - weight) / moved
        assert error < 1e-4, f"{name} is off by {error} of what it moved"


def orthogonalised_shapes(mesh: Mesh, *, student: str) -> list[tuple[int, ...]]:
    """Of the matrices that this rank works out in one update."""
    model = build_student(Path(student), mesh, vocabulary_size=310, compute_dtype=torch.float32, gather="micro_batch")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    shapes = []

    def noting(matrix: Tensor) -> Tensor:
        shapes.append(tuple(matrix.shape))
        return orthogonal(matrix)

    with mock.patch.object(muon, "orthogonal", noting):
        optimizer_over(model, CONFIG).step()
    return shapes


def test_ranks_divide_the_matrices_between_them(tiny_models: TinyModels) -> None:
    student = tiny_models.path("qwen3", seed=1, num_hidden_layers=3)
    shares = run_ranks(f"{HERE}:orthogonalised_shapes", ranks=2, student=str(student))
    layers = AutoModelForCausalLM.from_pretrained(student).model.layers
    matrices = [tuple(p.shape) for p in layers.parameters() if p.ndim == 2]
    assert sorted(tuple(shape) for share in shares for shape in share) == sorted(matrices)
    one, other = (sum(rows * columns * min(rows, columns) for rows, columns in share) for share in shares)
    assert abs(one - other) <= max(rows * columns * min(rows, columns) for rows, columns in matrices)


def test_one_matrix_moves_as_torch_s_own_muon_moves_it(tiny_models: TinyModels) -> None:
    layer = torch.nn.Linear(48, 80, bias=False)
    theirs, slope = torch.nn.Parameter(layer.weight.detach().clone()), torch.randn(80, 48)
    before = theirs.detach().clone()
    optimizer = optimizer_over(layer, CONFIG)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    set_learning_rate(optimizer, 0.02)
    for parameter, each in ((layer.weight, optimizer), (theirs, other)):
        parameter.grad = slope.clone()
        each.step()
    error = (layer.weight - theirs).norm() / (theirs - before).norm()
    assert error < 0.02  # theirs is computed in bfloat16


@pytest.fixture
def arguments(tiny_models: TinyModels, tmp_path: Path) -> dict[str, Any]:
    return {
        **tiny_models.student_and_teacher(),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": 6,
        "until": 6,
        "optimizer": {"name": "muon"},
    }


@pytest.mark.slow
def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    check_exact_continuation(arguments, tmp_path / "other")


def test_a_run_continues_on_another_number_of_ranks(arguments: dict[str, Any], tmp_path: Path) -> None:
    complete = run_ranks(f"{RUNS}:train", ranks=2, **arguments, save_at=3)[0]
    rest = run_ranks(f"{RUNS}:train", ranks=1, **arguments)[0]
    assert rest["first"] == 3
    assert rest["losses"] == pytest.approx(complete["losses"][3:], rel=1e-3)
    saved = FileSystemReader(tmp_path / "checkpoints" / "step-00000003").read_metadata().state_dict_metadata
    kept = {name.rpartition(".")[2] for name in saved if name.startswith("optimizer.") and "q_proj" in name}
    assert kept == {"momentum_buffer"}
