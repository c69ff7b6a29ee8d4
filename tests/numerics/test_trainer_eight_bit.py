"""Moments of 8 bits: the textbook's update to their rounding, a fifth of the memory, and exact continuation."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from kdmesh.errors import CheckpointError, ConfigError
from kdmesh_trainer.memory.memory_plan import plan
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.optimization import optimizer as optimizer_module
from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.optimization.optimizer import set_learning_rate
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from tests.numerics.test_memory_plan import DEEP, job, saved
from tests.support.killed_runs import check_exact_continuation
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

pytest.importorskip("torchao")
pytestmark = pytest.mark.slow

HERE = "tests.numerics.test_trainer_eight_bit"
RUNS = "tests.support.trainer_runs"
VOCABULARY_SIZE = 310
STEPS = 8
# So wide that most matrices of a rank have the 4096 values below which moments stay as they are.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def test_an_update_is_the_textbook_s_to_the_rounding_of_the_moments() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(64, 128), [torch.randn(64, 128) for _ in range(6)]
    model = torch.nn.Linear(128, 64, bias=False)
    with torch.no_grad():
        model.weight.copy_(start)
    config = OptimizerConfig(moments="8bit", learning_rate=0.1, weight_decay=0.01)
    optimizer = build_adamw(model, config)
    weight, first, second = start.double(), torch.zeros(64, 128).double(), torch.zeros(64, 128).double()
    for turn, gradient in enumerate(gradients, 1):
        rate = 0.1 / turn
        set_learning_rate(optimizer, rate)
        model.weight.grad = gradient.clone()
        optimizer.step()
        first = config.betas[0] * first + (1 - config.betas[0]) * gradient.double()
        second = config.betas[1] * second + (1 - config.betas[1]) * gradient.double().square()
        weight *= 1 - rate * config.weight_decay
        first_hat, second_hat = first / (1 - config.betas[0] ** turn), second / (1 - config.betas[1] ** turn)
        weight -= rate * first_hat / (second_hat.sqrt() + config.epsilon)
    moved = (model.weight.double() - weight).norm() / (weight - start.double()).norm()
    assert 1e-4 < moved < 0.03  # 8 bits, and no more than that


def losses_by_moments(mesh: Mesh, *, student: str, teacher: str) -> dict[str, Any]:
    """Losses of the same few sequences again and again with either kind of moments, and what they are kept in."""
    sequences = random_sequences(6, seed=3, vocabulary_size=VOCABULARY_SIZE)
    plans = {1: [[[0, 1, 3], [2, 4, 5]]], 2: [[[0, 1], [2]], [[3], [4, 5]]]}
    local_teacher = LocalTeacher(Path(teacher))
    found: dict[str, Any] = {}
    for moments in ("float32", "8bit"):
        model = build_student(Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
        config = OptimizerConfig(learning_rate=1e-2, schedule="constant", moments=moments)
        stepper = build_stepper(model, local_teacher, mesh, config=config, steps=STEPS)
        plan = plans[mesh.world_size][mesh.rank]
        found[moments] = [
            stepper.update(step_batch(sequences, plan, local_teacher, step=step)).loss_nats_per_token
            for step in range(STEPS)
        ]
    moments = [state["exp_avg"] for state in stepper.optimizer.state.values()]
    states = [moment.to_local() if isinstance(moment, DTensor) else moment for moment in moments]
    found["values"] = sum(state.numel() for state in states)
    found["quantized"] = sum(state.numel() for state in states if type(state).__name__ == "OptimState8bit")
    return found


@pytest.mark.parametrize(("family", "ranks"), [("qwen3", 1), ("qwen3", 2), ("mixtral", 2)])
def test_a_student_learns_alike_with_either_kind_of_moments(tiny_models: TinyModels, family: str, ranks: int) -> None:
    paths = {
        "student": str(tiny_models.path(family, seed=1, **WIDE)),
        "teacher": str(tiny_models.path("qwen3", seed=2)),
    }
    for found in run_ranks(f"{HERE}:losses_by_moments", ranks=ranks, **paths):
        assert found["quantized"] > 0.7 * found["values"]
        assert found["8bit"] == pytest.approx(found["float32"], rel=0.02)
        assert found["8bit"] != found["float32"]
        assert found["8bit"][-1] < 0.8 * found["8bit"][0]


@pytest.fixture
def arguments(tiny_models: TinyModels, tmp_path: Path) -> dict[str, Any]:
    return {
        "student": str(tiny_models.path("qwen3", seed=1, tie_word_embeddings=True, **WIDE)),
        "teacher": str(tiny_models.path("qwen3", seed=2)),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": STEPS,
        "optimizer": {"moments": "8bit"},
    }


def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    check_exact_continuation(arguments | {"until": STEPS}, tmp_path / "other")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 3)])  # on 3, parts begin within blocks
def test_a_run_continues_on_another_number_of_ranks(arguments: dict[str, Any], before: int, after: int) -> None:
    whole = run_ranks(f"{RUNS}:train", ranks=before, **arguments, until=STEPS, save_at=4)[0]
    rest = run_ranks(f"{RUNS}:train", ranks=after, **arguments, until=STEPS)[0]
    assert rest["first"] == 4
    assert rest["losses"] == pytest.approx(whole["losses"][4:], rel=2e-3)  # other matrices are whole on one rank


def test_a_checkpoint_asks_for_the_space_that_it_takes(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ranks(f"{RUNS}:train", ranks=1, **arguments, until=2, save_at=1)
    on_disk = sum(file.stat().st_size for file in (Path(arguments["checkpoints"]) / "step-00000001").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(CheckpointError, match="not enough space") as refused:
        run_ranks(f"{RUNS}:train", ranks=1, **arguments, until=2, save_at=2)
    needed = int(str(refused.value).partition("(")[2].split()[0])
    assert on_disk <= needed <= on_disk + 2**20


def test_a_plan_counts_a_byte_for_each_moment(tmp_path: Path) -> None:
    whole = job(saved(tmp_path, DEEP, is_tied=True), 4000, [64])
    bytes_by_moments = {}
    for moments in ("float32", "8bit"):
        told = whole.optimizer.model_copy(update={"moments": moments})
        bytes_by_moments[moments] = plan(replace(whole, optimizer=told)).resident["AdamW"]
    assert bytes_by_moments["8bit"] == pytest.approx(bytes_by_moments["float32"] / 8 * (2 + 2 * 4 / 256), rel=0.02)


def test_what_is_not_installed_is_said_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.delitem(sys.modules, "kdmesh_trainer.optimization.eight_bit", raising=False)
    with pytest.raises(ConfigError, match=r"optimizer.moments 8bit needs torchao \(pip install 'kdmesh\[eightbit\]'\)"):
        optimizer_module.check_optimizer(OptimizerConfig(moments="8bit"))
