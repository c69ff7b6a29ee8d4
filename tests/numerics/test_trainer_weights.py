"""Rows that weigh more count more: one weighted mean of all loss tokens, however they are spread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdmesh.losses import MixedTeacher, OutputHead, forward_kl
from kdmesh.losses.build import build_divergence
from kdmesh.types import TokenSequence
from kdmesh_trainer.algorithms.seam import LossRows, Terms
from kdmesh_trainer.algorithms.vanilla_kd import vanilla_kd
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.head import Target
from kdmesh_trainer.objectives.objective import CrossEntropy
from kdmesh_trainer.objectives.spread import spread
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.step import GradientStepper
from kdmesh_trainer.student.weights import whole
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

VOCABULARY_SIZE = 310
WEIGHTS = (0.3, 1.0, 1.0, 2.5, 1.0, 1e-3)
# Ranks -> layouts -> rank -> micro-batches -> sequences; in some micro-batches all weigh 1, and one is a blank.
LAYOUTS = {
    1: [[[[0, 1, 2, 3, 4, 5]]], [[[0, 5], [1, 2], [3, 4]]]],
    2: [[[[1, 2, 4]], [[0, 3, 5]]], [[[0], [1, 2]], [[3, 4, 5], []]]],
}


def batch_sequences() -> list[TokenSequence]:
    plain = random_sequences(len(WEIGHTS), seed=11, vocabulary_size=VOCABULARY_SIZE)
    return [replace(sequence, weight=weight) for sequence, weight in zip(plain, WEIGHTS, strict=True)]


def gradients(mesh: Mesh, *, student: str, teacher: str, output: str, spreads_head: bool, is_sft: bool) -> None:
    """Writes every layout's loss and whole gradient to `output`; runs on every rank."""
    model = build_student(
        Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32, spreads_head=spreads_head
    )
    local_teacher = LocalTeacher(Path(teacher))
    stepper = build_stepper(model, local_teacher, mesh, config=OptimizerConfig(), steps=1)
    if is_sft:
        objective = CrossEntropy() if model.share is None else spread(CrossEntropy(), model.share)
        stepper = GradientStepper(model, objective, stepper.optimizer, config=OptimizerConfig(), steps=1, mesh=mesh)
    for number, plan in enumerate(LAYOUTS[mesh.world_size]):
        batch = step_batch(batch_sequences(), plan[mesh.rank], None if is_sft else local_teacher)
        stepper.accumulate(batch)
        results = {name: whole(p.grad, None).clone() for name, p in model.lm.named_parameters()}
        results["loss"] = torch.tensor([stepper.update(batch).loss_nats_per_token])
        if mesh.is_first:
            save_file(results, Path(output) / f"{mesh.world_size}-{number}.safetensors")
        return_to = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).state_dict()
        with torch.no_grad():
            for name, parameter in model.lm.named_parameters():
                parameter.copy_(_like(return_to[name], parameter))


def _like(value: Tensor, shard: Tensor) -> Tensor:
    if not isinstance(shard, torch.distributed.tensor.DTensor):
        return value
    return torch.distributed.tensor.distribute_tensor(value, shard.device_mesh, shard.placements)


def textbook(student: Path, teacher: Path, *, is_sft: bool) -> dict[str, Tensor]:
    """In float64: sum of weight * loss over all loss tokens, divided by the sum of their weights."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    other = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    weights = 0.0
    for sequence, weight in zip(batch_sequences(), WEIGHTS, strict=True):
        token_ids = torch.from_numpy(sequence.token_ids).long()[None]
        positions = torch.from_numpy(sequence.positions).long()
        log_q_RV = model(token_ids).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1)
        log_p_RV = other(token_ids).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1).detach()
        cross_entropy_R = -log_q_RV.gather(1, torch.from_numpy(sequence.labels).long()[:, None]).squeeze(1)
        loss_R = cross_entropy_R if is_sft else (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(1) + 0.3 * cross_entropy_R
        total = total + weight * loss_R.sum()
        weights += weight * len(positions)
    loss = total / weights
    loss.backward()
    return {"loss": loss.detach()[None], **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize(
    ("is_sft", "spreads_head"),
    [
        (False, False),
        (True, False),
        (False, True),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_the_weighted_mean_of_all_loss_tokens_in_every_layout(
    tiny_models: TinyModels, tmp_path: Path, is_sft: bool, spreads_head: bool
) -> None:
    student = tiny_models.path("qwen3", seed=1)
    teacher = tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336)
    expected = textbook(student, teacher, is_sft=is_sft)
    for ranks, layouts in LAYOUTS.items():
        run_ranks(
            "tests.numerics.test_trainer_weights:gradients",
            ranks=ranks,
            student=str(student),
            teacher=str(teacher),
            output=str(tmp_path),
            spreads_head=spreads_head and ranks > 1,
            is_sft=is_sft,
        )
        for number in range(len(layouts)):
            found = load_file(tmp_path / f"{ranks}-{number}.safetensors")
            assert found.keys() == expected.keys()
            for name, wanted in expected.items():
                error = (found[name] - wanted).norm() / wanted.norm()
                assert error < 1e-5, f"{ranks} ranks, layout {number}: {name} is off by {error}"


@pytest.mark.parametrize("unit", [1e-60, 1e60])
def test_only_how_weights_compare_matters_not_how_large_they_are(
    mesh: Mesh, tiny_models: TinyModels, unit: float
) -> None:
    student = build_student(
        tiny_models.path("qwen3", seed=1), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32
    )
    teacher = LocalTeacher(tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336))
    stepper = build_stepper(student, teacher, mesh, config=OptimizerConfig(), steps=1)
    plan = LAYOUTS[1][1][0]
    gradients, losses = [], []
    for factor in (1.0, unit):
        sequences = [replace(sequence, weight=factor * sequence.weight) for sequence in batch_sequences()]
        tally = stepper.accumulate(step_batch(sequences, plan, teacher))
        gradients.append(torch.cat([whole(p.grad, None).flatten() for p in student.lm.parameters()]))
        losses.append(tally.over_all_ranks()[0].loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert (gradients[1] - gradients[0]).norm() < 1e-6 * gradients[0].norm()


def test_rows_keep_their_weights_when_several_teachers_share_them() -> None:
    random = torch.Generator().manual_seed(5)
    hidden_RD, weight_R = torch.randn(7, 6, generator=random), torch.rand(7, generator=random)
    head, *heads = (OutputHead(weight_VD=torch.randn(11, 6, generator=random)) for _ in range(3))
    labels_R, places = torch.arange(7), (torch.tensor([0, 3, 6]), torch.tensor([1, 2, 4, 5]))
    theirs = [torch.randn(len(index_R), 6, generator=random) for index_R in places]
    targets = tuple(
        Target(index_R=index_R, teachers=(MixedTeacher(hidden_RE=rows_RE, head=other, weight=1.0),))
        for index_R, rows_RE, other in zip(places, theirs, heads, strict=True)
    )
    answered: Any = SimpleNamespace(targets=lambda _: targets)  # Heads
    rows = LossRows(
        hidden_RD=hidden_RD, head=head, labels_R=labels_R, weight_R=weight_R, teacher=answered, heads=answered
    )
    terms = Terms(divergence=forward_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.3)
    log_q_RV = (hidden_RD.double() @ head.weight_VD.double().T).log_softmax(-1)
    loss_R = -0.3 * log_q_RV[torch.arange(7), labels_R]
    for index_R, rows_RE, other in zip(places, theirs, heads, strict=True):
        log_p_RV = (rows_RE.double() @ other.weight_VD.double().T).log_softmax(-1)
        loss_R[index_R] += (log_p_RV.exp() * (log_p_RV - log_q_RV[index_R])).sum(-1)
    assert vanilla_kd(rows, terms).loss_sum.item() == pytest.approx(float((weight_R.double() * loss_R).sum()), rel=1e-5)


def test_weights_of_drawn_tokens_go_with_a_divergence_that_is_estimated_from_them() -> None:
    random = torch.Generator().manual_seed(6)
    hidden_RD, theirs_RE = torch.randn(5, 6, generator=random), torch.randn(5, 6, generator=random)
    head, other = (OutputHead(weight_VD=torch.randn(11, 6, generator=random)) for _ in range(2))
    terms = Terms(divergence=build_divergence("sampled_reverse_kl"), temperature=1.0, kd_weight=1.0, ce_weight=0.0)

    def gradient(weight_R: Tensor | None, rows: slice = slice(None)) -> Tensor:
        own_RD = hidden_RD.clone().requires_grad_()
        teachers = [MixedTeacher(hidden_RE=theirs_RE[rows], head=other, weight=1.0)]
        loss = terms.compare(own_RD[rows], head, teachers, torch.arange(5)[rows], token_weight_R=weight_R)
        (found_RD,) = torch.autograd.grad(loss.loss_sum, own_RD)
        return found_RD

    weight_R = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1])
    expected_RD = sum(float(weight) * gradient(None, slice(row, row + 1)) for row, weight in enumerate(weight_R))
    torch.testing.assert_close(gradient(weight_R), expected_RD, rtol=1e-5, atol=1e-6)
