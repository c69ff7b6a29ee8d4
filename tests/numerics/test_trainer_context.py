"""Context distillation: the teacher's distribution after its own, longer prompt, row by row against the student's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.sides import InContext
from kdmesh_trainer.evaluate import HeldOutEvaluator
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.sections.batch_config import BatchConfig
from kdmesh_trainer.sources.off_policy import OffPolicySource
from kdmesh_trainer.sources.plan import StepPlanner
from tests.support.tiny_models import TinyModels
from tests.support.trainer_on_policy import MAX_TOKENS, OPTIMIZER, VOCABULARY_SIZE, Run, losses
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences
from tests.support.trainer_ranks import run_ranks
from tests.support.trainer_rollouts import FastRollouts

pytestmark = pytest.mark.slow

HERE = "tests.numerics.test_trainer_context"
STEPS = 3


@pytest.fixture(scope="module")
def models(tiny_models: TinyModels) -> dict[str, str]:
    return {"student": str(tiny_models.path("qwen3", seed=1)), "teacher": str(tiny_models.path("qwen3", seed=2))}


def in_context(count: int) -> list[InContext]:
    """Sequences that the teacher reads after 3 to 30 more tokens, with one more of its own in between."""
    random = np.random.default_rng(4)
    pairs = []
    for own in random_sequences(count, seed=8, vocabulary_size=VOCABULARY_SIZE):
        told = random.integers(0, VOCABULARY_SIZE, int(random.integers(3, 30))).astype(np.int32)
        teacher = TokenSequence(
            token_ids=np.concatenate([told, own.token_ids]), positions=(own.positions + len(told)).astype(np.int32)
        )
        pairs.append(InContext(token_ids=own.token_ids, positions=own.positions, teacher=teacher))
    return pairs


def textbook_kl(models: dict[str, str], sequences: Sequence[TokenSequence]) -> float:
    """Mean KL(teacher || student) from whole logits of Hugging Face's own forward in float64."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(models[m], dtype=torch.float64) for m in models)
    total = 0.0
    for sequence in sequences:
        assert isinstance(sequence, InContext)
        q_RV, p_RV = log_probabilities(student, sequence), log_probabilities(teacher, sequence.teacher)
        total += float((p_RV.exp() * (p_RV - q_RV)).sum())
    return total / sum(sequence.num_rows for sequence in sequences)


@torch.no_grad()
def log_probabilities(model: Any, sequence: TokenSequence) -> torch.Tensor:
    ids = torch.from_numpy(sequence.token_ids).long()[None]
    logits_RV = model(ids).logits[0, torch.from_numpy(sequence.positions).long(), :VOCABULARY_SIZE]
    return logits_RV.log_softmax(-1)


def test_held_out_data_is_judged_in_the_teachers_context(mesh: Mesh, models: dict[str, str]) -> None:
    held_out, teacher = in_context(6), LocalTeacher(Path(models["teacher"]))
    evaluator = HeldOutEvaluator(
        build_student(Path(models["student"]), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32),
        held_out,
        teacher=teacher,
        teacher_head=TeacherHead(teacher, vocabulary_size=VOCABULARY_SIZE, device=mesh.device),
        max_tokens=64,
        prefetch=1,
        mesh=mesh,
    )
    assert evaluator.evaluate().kl_nats_per_token == pytest.approx(textbook_kl(models, held_out), rel=1e-5)


def train(mesh: Mesh, *, student: str, teacher: str) -> list[list[float | None]]:
    """Loss figures of an off-policy run, its first step's mean divergence first."""
    model = build_student(Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
    local = LocalTeacher(Path(teacher))
    batch = BatchConfig(sequences=5, max_tokens=MAX_TOKENS)
    planner = StepPlanner(in_context(5), batch, seed=0, rank=mesh.rank, ranks=mesh.world_size)
    source = OffPolicySource(planner, local, prefetch=2, steps=STEPS)
    source.start_at(0)
    stepper = build_stepper(model, local, mesh, config=OPTIMIZER, steps=STEPS)
    stats = [stepper.update(source.next_batch()) for _ in range(STEPS)]
    return [[s.divergence_nats_per_token, s.loss_nats_per_token] for s in stats]


def test_off_policy_training_compares_the_response_alone_on_any_number_of_ranks(
    mesh: Mesh, models: dict[str, str]
) -> None:
    alone = train(mesh, **models)
    first, second = run_ranks(f"{HERE}:train", ranks=2, **models)
    assert first == second
    assert np.array(first) == pytest.approx(np.array(alone), rel=1e-4)
    assert alone[0][0] == pytest.approx(textbook_kl(models, in_context(5)), rel=1e-5)


def test_samples_are_scored_after_the_teachers_prompt(mesh: Mesh, models: dict[str, str]) -> None:
    run = Run(mesh, **models, steps=1, has_context=True)
    [(batch, stats)] = list(run.train(run.source(FastRollouts(run.copy), max_staleness=0)))
    sequences = [sequence for micro_batch in batch.micro_batches for sequence in micro_batch.sequences]
    assert stats.divergence_nats_per_token == pytest.approx(textbook_kl(models, sequences), rel=1e-5)
    for sequence in sequences:
        assert isinstance(sequence, InContext)
        assert sequence.teacher.token_ids[30:].tolist() == sequence.token_ids.tolist()


def test_two_ranks_score_the_samples_of_one_in_the_teachers_context(mesh: Mesh, models: dict[str, str]) -> None:
    target, arguments = "tests.support.trainer_on_policy:losses", {**models, "steps": 2, "has_context": True}
    alone = losses(mesh, **arguments)
    first, second = run_ranks(target, ranks=2, **arguments)
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    plain = losses(mesh, **{**arguments, "has_context": False})
    assert plain["sequences"][0] == alone["sequences"][0]
    assert plain["losses"][0] != alone["losses"][0]
