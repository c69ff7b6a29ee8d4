"""Both precision policies train, on float32 master weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

VOCABULARY_SIZE = 310
STEPS = 15


def losses_by_policy(mesh: Mesh, *, student: str, teacher: str) -> dict[str, list[float]]:
    """Losses of the same few sequences again and again, under either policy."""
    sequences = random_sequences(6, seed=3, vocabulary_size=VOCABULARY_SIZE)
    plans = [[[0, 1], [2]], [[3], [4, 5]]] if mesh.world_size == 2 else [[[0, 1, 3], [2, 4, 5]]]
    local_teacher = LocalTeacher(Path(teacher), dtype=torch.bfloat16)
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    losses: dict[str, list[float]] = {}
    for name in ("float32", "bfloat16"):
        model = build_student(Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=getattr(torch, name))
        stepper = build_stepper(model, local_teacher, mesh, config=config, steps=STEPS)
        losses[name] = [
            stepper.update(step_batch(sequences, plans[mesh.rank], local_teacher, step=step)).loss_nats_per_token
            for step in range(STEPS)
        ]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {value.dtype for state in stepper.optimizer.state.values() for value in state.values()} == {
            torch.float32
        }
    return losses


@pytest.mark.parametrize("ranks", [1, 2])
def test_float32_and_bfloat16_learn_alike(tiny_models: TinyModels, ranks: int) -> None:
    losses = run_ranks(
        "tests.numerics.test_trainer_precision:losses_by_policy",
        ranks=ranks,
        student=str(tiny_models.path("qwen3", seed=1, tie_word_embeddings=True)),
        teacher=str(tiny_models.path("qwen3", seed=2)),
    )[0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]
    for values in losses.values():
        assert values[-1] < 0.8 * values[0]
