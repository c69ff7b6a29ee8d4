"""Steps that hold samples of the student and answers of the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from kdmesh.tokens import digest
from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sources.batches import StepBatch
from kdmesh_trainer.student.weights import whole
from tests.support.tiny_models import TinyModels
from tests.support.trainer_on_policy import PROMPTS_PER_STEP, SAMPLES_PER_PROMPT, VOCABULARY_SIZE, Run, losses
from tests.support.trainer_ranks import run_ranks
from tests.support.trainer_rollouts import FastRollouts

pytestmark = pytest.mark.slow

ANSWERS = 4
SAMPLES = PROMPTS_PER_STEP * SAMPLES_PER_PROMPT
CE_WEIGHT = 0.7


@pytest.fixture(scope="module")
def models(tiny_models: TinyModels) -> dict[str, Any]:
    return {
        "student": str(tiny_models.path("qwen3", seed=1)),
        "teacher": str(tiny_models.path("qwen3", seed=2)),
        "steps": 3,
        "answers": ANSWERS,
        "ce_weight": CE_WEIGHT,
    }


@pytest.fixture(scope="module")
def alone(mesh: Mesh, models: dict[str, Any]) -> dict[str, Any]:
    return losses(mesh, **models)


def split(batch: StepBatch) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """The samples and the answers of a rank's share."""
    samples, answers = [], []
    for micro_batch in batch.micro_batches:
        left = micro_batch.num_sampled_rows
        for sequence in micro_batch.sequences:
            (samples if left > 0 else answers).append(sequence)
            left -= sequence.num_rows
    return samples, answers


def test_every_step_holds_both_and_its_answers_follow_from_seed_and_step(mesh: Mesh, models: dict[str, Any]) -> None:
    run = Run(mesh, **models)
    assert run.answers is not None
    for step, (batch, _) in enumerate(run.train(run.source(FastRollouts(run.copy), max_staleness=1))):
        samples, answers = split(batch)
        assert len(samples) == SAMPLES
        assert sorted(digest([s]) for s in answers) == sorted(digest([s]) for s in run.answers.of_step(step))
        assert batch.num_loss_tokens == sum(s.num_rows for s in (*samples, *answers))
        assert batch.rollouts is not None
        assert batch.rollouts.response_tokens_mean == sum(s.num_rows for s in samples) / SAMPLES


@torch.no_grad()
def textbook(
    models: dict[str, Any], samples: list[TokenSequence], answers: list[TokenSequence]
) -> tuple[float, float, float]:
    """The loss, the samples' mean entropy and the overlap of the 8 likeliest tokens, from whole logits in float64."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float64) for name in ("student", "teacher")
    )
    loss = entropy = overlap = 0.0
    for sequence in (*samples, *answers):
        ids, positions = torch.from_numpy(sequence.token_ids).long()[None], torch.from_numpy(sequence.positions).long()
        q_RV, p_RV = (m(ids).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1) for m in (student, teacher))
        loss += float((p_RV.exp() * (p_RV - q_RV)).sum())
        best = [log_p_RV.topk(8).indices for log_p_RV in (q_RV, p_RV)]
        overlap += float((best[0].unsqueeze(1) == best[1].unsqueeze(2)).any(-1).double().mean(-1).sum())
        if any(sequence is answer for answer in answers):
            loss += CE_WEIGHT * float(cross_entropy(q_RV, torch.from_numpy(sequence.labels).long(), reduction="sum"))
        else:
            entropy -= float((q_RV.exp() * q_RV).sum())
    rows = sum(s.num_rows for s in (*samples, *answers))
    return loss / rows, entropy / sum(s.num_rows for s in samples), overlap / rows


def test_only_the_answers_are_imitated_and_only_the_samples_are_looked_at(mesh: Mesh, models: dict[str, Any]) -> None:
    run = Run(mesh, **models)
    batch, stats = next(run.train(run.source(FastRollouts(run.copy), max_staleness=0)))
    loss, entropy, overlap = textbook(models, *split(batch))
    assert stats.loss_nats_per_token == pytest.approx(loss, rel=1e-5)
    assert stats.topk_overlap == pytest.approx(overlap, abs=1e-6)
    assert 0 < overlap < 1
    assert stats.samples is not None
    assert stats.samples.student_entropy_nats == pytest.approx(entropy, rel=1e-5)
    assert stats.samples.sampler_kl_k3_nats == pytest.approx(0, abs=1e-9)


def test_two_ranks_learn_what_one_does(models: dict[str, Any], alone: dict[str, Any]) -> None:
    first, second = run_ranks("tests.support.trainer_on_policy:losses", ranks=2, **models)
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert sorted(first["sequences"][0] + second["sequences"][0]) == alone["sequences"][0]


def test_a_continued_run_holds_the_same_sequences(mesh: Mesh, models: dict[str, Any]) -> None:
    whole, rest = Run(mesh, **models), Run(mesh, **models, served=9)
    steps = list(whole.train(whole.source(FastRollouts(whole.copy), max_staleness=0)))
    batch, _ = next(rest.train(rest.source(FastRollouts(rest.copy), max_staleness=0), first=2))
    answers = [sorted(digest([s]) for s in split(b)[1]) for b in (steps[2][0], batch)]
    assert answers[0] == answers[1] != sorted(digest([s]) for s in split(steps[1][0])[1])


def test_the_answers_have_a_gradient_of_their_own(mesh: Mesh, models: dict[str, Any]) -> None:
    gradients = []
    for ce_weight in (0.0, CE_WEIGHT):
        run = Run(mesh, **{**models, "ce_weight": ce_weight})
        source = run.source(FastRollouts(run.copy), max_staleness=0)
        source.start_at(0)
        source.publish(version=0)
        batch = source.next_batch()
        run.stepper.accumulate(batch)
        gradients.append({name: whole(p.grad, None).numpy() for name, p in run.model.named_parameters()})
    lm = AutoModelForCausalLM.from_pretrained(models["student"])
    _, answers = split(batch)
    total = torch.zeros(())
    for sequence in answers:
        ids, positions = torch.from_numpy(sequence.token_ids).long()[None], torch.from_numpy(sequence.positions).long()
        logits_RV = lm(ids).logits[0, positions, :VOCABULARY_SIZE]
        total = total + cross_entropy(logits_RV, torch.from_numpy(sequence.labels).long(), reduction="sum")
    (CE_WEIGHT * total / batch.num_loss_tokens).backward()  # type: ignore[no-untyped-call]
    for name, parameter in lm.named_parameters():
        difference = gradients[1][f"lm.{name}"] - gradients[0][f"lm.{name}"]
        assert np.allclose(difference, parameter.grad.numpy(), atol=2e-6), name
