"""A student whose head is spread over ranks by tokens learns what it learns with a whole one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.body import empty_causal_lm
from kdmesh.models.head import output_head
from kdmesh_trainer.evaluate import HeldOutEvaluator
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.student.model import Student
from kdmesh_trainer.student.spread_head import check_head
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

VOCABULARY_SIZE = 310
STEPS = 3
# Large, so that an update is smooth in the gradient and rounding stays rounding.
OPTIMIZER = OptimizerConfig(learning_rate=0.1, epsilon=1e-2, weight_decay=0.01, max_gradient_norm=0.5)
# Steps -> ranks -> micro-batches -> sequences; shares are uneven, and one has blanks.
PLANS = {
    2: [[[0, 1, 2], [3]], [[4, 5], []]],
    3: [[[0, 1, 2], [3]], [[], []], [[4, 5], []]],
}


def trained(
    mesh: Mesh, path: str, teacher: str, *, gather: Gather, spreads_head: bool, dtype: torch.dtype
) -> tuple[Student, Any]:
    """The student after some steps, and what was measured."""
    local = LocalTeacher(Path(teacher))
    student = build_student(
        Path(path),
        mesh,
        vocabulary_size=VOCABULARY_SIZE,
        compute_dtype=dtype,
        gather=gather,
        spreads_head=spreads_head,
    )
    stepper = build_stepper(student, local, mesh, config=OPTIMIZER, steps=STEPS, is_sampled=True)
    sequences = random_sequences(6, seed=3, vocabulary_size=VOCABULARY_SIZE)
    measured: dict[str, list[float | None]] = {"nats": [], "shares of rows": []}
    for step in range(STEPS):
        stats = stepper.update(step_batch(sequences, PLANS[mesh.world_size][mesh.rank], local, step=step))
        nats = [stats.loss_nats_per_token, stats.divergence_nats_per_token, stats.cross_entropy_nats_per_token]
        measured["nats"] += [*nats, stats.gradient_norm]
        measured["shares of rows"] += [stats.top1_agreement, stats.topk_overlap]
    evaluator = HeldOutEvaluator(
        student,
        sequences[:1],  # all other ranks only take part
        teacher=local,
        teacher_head=TeacherHead(local, vocabulary_size=VOCABULARY_SIZE, device=mesh.device),
        max_tokens=64,
        prefetch=0,
        mesh=mesh,
    )
    scores = evaluator.evaluate()
    measured["nats"] += [scores.kl_nats_per_token, scores.cross_entropy_nats_per_token]
    measured["shares of rows"].append(scores.top1_agreement)
    return student, measured


def compare(mesh: Mesh, *, students: list[str], teacher: str, gather: Gather, dtype: str) -> dict[str, Any]:
    """Of every student both ways: what was measured, and how far weights are apart relative to how far they moved."""
    results: dict[str, Any] = {}
    for path in students:
        (whole, expected), (spread, measured) = (
            trained(mesh, path, teacher, gather=gather, spreads_head=spreads_head, dtype=getattr(torch, dtype))
            for spreads_head in (False, True)
        )
        untouched = build_student(
            Path(path), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32
        ).weights()
        assert_is_spread(spread, mesh)
        apart = {}
        for name, weight in whole.weights().items():
            before, theirs = untouched[name].whole(None), weight.whole(None)
            mine = spread.weights()[name].whole(None)
            assert mine.shape == theirs.shape
            apart[name] = relative(mine - theirs, theirs - before)
        results[path] = {"expected": expected, "measured": measured, "apart": apart}
    return results


def relative(error: Tensor, size: Tensor) -> float:
    return error.norm().item() / max(size.norm().item(), 1e-12)


def assert_is_spread(student: Student, mesh: Mesh) -> None:
    """No rank holds more than its part of the head, nor can it have gathered it."""
    weight = output_head(student.lm).weight_VD
    assert isinstance(weight, DTensor)
    assert len(weight.to_local()) <= -(-len(weight) // mesh.world_size)
    assert weight is student.lm.get_output_embeddings().weight
    is_tied = student.lm.config.get_text_config().tie_word_embeddings
    assert (student.lm.get_input_embeddings().weight is weight) == is_tied


# Tied or not; gemma2 scales its embedding and caps its logits, phi's head has a bias, and padding is a token of theirs.
@pytest.mark.parametrize(
    ("ranks", "gather", "dtype"),
    [
        (2, "micro_batch", "float32"),
        pytest.param(3, "step", "float32", marks=pytest.mark.slow),
        pytest.param(3, "micro_batch", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_weights_after_several_steps_are_those_of_a_whole_head(
    tiny_models: TinyModels, ranks: int, gather: Gather, dtype: str
) -> None:
    students = {
        "untied": tiny_models.path("qwen3", seed=1),
        "tied": tiny_models.path("qwen3", seed=1, tie_word_embeddings=True, pad_token_id=7),
        "scaled and capped": tiny_models.path("gemma2", seed=1),
        "with a bias": tiny_models.path("phi", seed=1),
    }
    results = run_ranks(
        "tests.numerics.test_trainer_spread_head:compare",
        ranks=ranks,
        students=[str(path) for path in students.values()],
        teacher=str(tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336)),
        gather=gather,
        dtype=dtype,
    )[0]
    tolerance = 1e-4 if dtype == "float32" else 0.1
    one_row = 0.0 if dtype == "float32" else 0.03  # of 38 or more, whose favourite token is a matter of rounding
    for kind, path in students.items():
        result = results[str(path)]
        for what, bound in (("nats", 0.0), ("shares of rows", one_row)):
            expected = pytest.approx(result["expected"][what], rel=tolerance, abs=bound)
            assert result["measured"][what] == expected, f"{kind}, {what}"
        for name, apart in result["apart"].items():
            assert apart < tolerance, f"{kind}: {name} is off by {apart} of what it moved"


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3", lambda lm: lm.set_output_embeddings(nn.Sequential(lm.lm_head)), "of qwen3 is a Sequential; it must"),
        (
            "gemma2",
            lambda lm: setattr(lm.get_input_embeddings(), "max_norm", 1.0),
            "input embedding too, a Gemma2TextScaledWord",
        ),
    ],
)
def test_a_head_that_cannot_be_spread_is_refused(
    family: str, change: Callable[[PreTrainedModel], None], words: str, tiny_models: TinyModels
) -> None:
    path = tiny_models.path(family, seed=1, tie_word_embeddings=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm = empty_causal_lm(path)
        check_head(lm)
        change(lm)
        with pytest.raises(ConfigError, match=words):
            check_head(lm)
