"""Dual-space distillation is the textbook's, in value and in the gradient of all that it trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdmesh.alignment.vocabularies import SharedTokens
from kdmesh.losses import FusedLoss, OutputHead, forward_kl, reverse_kl
from kdmesh_trainer.algorithms.dskd import DualSpaceKD
from kdmesh_trainer.algorithms.projection import logit_preserving_map
from kdmesh_trainer.algorithms.seam import Setup, StudentRows, Terms
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.objectives.objective import Distillation
from kdmesh_trainer.sources.batches import PanelPart, PanelRows
from tests.support import textbook_losses as textbook
from tests.support.tensor_watch import SavedTensors, TensorWatch
from tests.support.trainer_parts import Rows

CPU = torch.device("cpu")
KD_WEIGHT, TEMPERATURE, ROWS = 0.7, 2.0, 120
SHARED = SharedTokens(
    student_ids=np.arange(20, dtype=np.int32) + 3,
    teacher_ids=np.random.default_rng(0).permutation(30)[:20].astype(np.int32),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Leaves of both models in float64."""

    hidden_RD: Tensor
    weight_VD: Tensor
    bias_V: Tensor
    labels_R: Tensor
    teacher_AE: Tensor
    teacher_UE: Tensor
    index_A: Tensor

    @property
    def head(self) -> OutputHead:
        return OutputHead(weight_VD=self.weight_VD, bias_V=self.bias_V, logit_scale=0.8)

    @property
    def teacher_head(self) -> OutputHead:
        return OutputHead(weight_VD=self.teacher_UE, logit_softcap=20.0)

    def head_service(self) -> tuple[OutputHead, int]:
        return self.teacher_head, 1


class _Fixed:
    """A teacher's head that is a matrix."""

    def __init__(self, weight_VE: Tensor) -> None:
        self._weight_VE = weight_VE

    def head(self) -> tuple[OutputHead, int]:
        return OutputHead(weight_VD=self._weight_VE), 1


class Service:
    """A teacher's head."""

    def __init__(self, pair: Pair) -> None:
        self.head = pair.head_service


def pair_of(*, vocabularies: tuple[int, int], num_answers: int, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own, theirs = vocabularies
    return Pair(
        hidden_RD=normal(ROWS, 6).requires_grad_(),
        weight_VD=normal(own, 6).requires_grad_(),
        bias_V=(normal(own) * 0.3).requires_grad_(),
        labels_R=torch.randint(own, (ROWS,), generator=generator),
        teacher_AE=normal(num_answers, 9),
        teacher_UE=normal(theirs, 9),
        index_A=torch.randperm(ROWS, generator=generator)[:num_answers].sort().values,
    )


def dskd(pair: Pair, shared: SharedTokens | None, *, trains_lift: bool = False) -> DualSpaceKD:
    setup = Setup(
        student_head=pair.head.detached(),
        teacher_heads=lambda: {"": pair.teacher_head},
        shared=shared,
        device=CPU,
    )
    algorithm = DualSpaceKD(setup, trains_lift=trains_lift).double()
    # Away from where it begins, so that it agrees with the teacher on some rows and not on others.
    with torch.no_grad():
        for parameter in algorithm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    return algorithm


def loss_of(
    pair: Pair, algorithm: nn.Module, shared: SharedTokens | None, *, ce_weight: float, num_sampled: int = 0
) -> FusedLoss:
    objective = Distillation(
        terms=Terms(divergence=reverse_kl, temperature=TEMPERATURE, kd_weight=KD_WEIGHT, ce_weight=ce_weight),
        teacher_head=TeacherHead(Service(pair), vocabulary_size=len(pair.teacher_UE), device=CPU, shared=shared),
        algorithm=algorithm,
    )
    rows = Rows(rows_RD=pair.teacher_AE)
    part = PanelPart(name="", rows=rows, index_R=pair.index_A, num_tokens=50, wait_s=0.0)
    teacher = rows if shared is None else PanelRows(parts=(part,))
    return objective(
        StudentRows(hidden_RD=pair.hidden_RD, head=pair.head, labels_R=pair.labels_R, num_sampled=num_sampled), teacher
    )


def lift_of(pair: Pair, algorithm: DualSpaceKD, shared: SharedTokens | None) -> Tensor:
    """B, of the heads as they are now unless it is trained."""
    if algorithm.student_to_teacher is not None:
        return algorithm.student_to_teacher
    own_VD, theirs_VE = 0.8 * pair.weight_VD.detach(), pair.teacher_UE
    if shared is not None:
        own_VD, theirs_VE = own_VD[shared.student_ids.tolist()], theirs_VE[shared.teacher_ids.tolist()]
    return torch.linalg.pinv(theirs_VE) @ own_VD


def expected(
    pair: Pair, algorithm: DualSpaceKD, shared: SharedTokens | None, *, ce_weight: float, num_sampled: int = 0
) -> tuple[Tensor, Tensor]:
    """The loss, and the rows on which the projected teacher agrees with the teacher."""
    scaled, capped = textbook.Transform(scale=0.8), textbook.Transform(softcap=20.0)
    student_AD = pair.hidden_RD[pair.index_A]
    z_s = textbook.logits(student_AD, pair.weight_VD, pair.bias_V, scaled)
    z_t = textbook.logits(pair.teacher_AE, pair.teacher_UE, None, capped)
    projected_AD = pair.teacher_AE @ algorithm.teacher_to_student.T
    z_t2s = textbook.logits(projected_AD, pair.weight_VD.detach(), pair.bias_V.detach(), scaled)
    z_s2t = textbook.logits(student_AD @ lift_of(pair, algorithm, shared).T, pair.teacher_UE, None, capped)
    preferred = z_t.argmax(-1).tolist()
    if shared is not None:
        mapped = dict(zip(shared.teacher_ids.tolist(), shared.student_ids.tolist(), strict=True))
        preferred = [mapped.get(token, -1) for token in preferred]
    loss = torch.zeros((), dtype=torch.float64)
    agrees = []
    for row, token in enumerate(preferred):
        p, q = textbook.softmax(z_t2s[row][None].detach(), TEMPERATURE), textbook.softmax(z_s[row][None], TEMPERATURE)
        if token >= 0:
            loss = loss - KD_WEIGHT * textbook.softmax(z_t2s[row][None])[0, token].log()
        agrees.append(int(z_t2s[row].argmax()) == token)
        if agrees[-1]:
            loss = loss + KD_WEIGHT * textbook.kullback_leibler(q, p).sum()
        lifted = textbook.softmax(z_s2t[row][None], TEMPERATURE)
        loss = loss + KD_WEIGHT * textbook.kullback_leibler(lifted, textbook.softmax(z_t[row][None], TEMPERATURE)).sum()
    whole_RV = textbook.logits(pair.hidden_RD, pair.weight_VD, pair.bias_V, scaled)
    loss = loss + ce_weight * textbook.cross_entropy(whole_RV, pair.labels_R)[num_sampled:].sum()
    return loss, torch.tensor(agrees)


@pytest.mark.parametrize("trains_lift", [False, True], ids=["B follows", "B is trained"])
@pytest.mark.parametrize(("ce_weight", "num_sampled"), [(0.0, 0), (0.3, 0), (0.3, 11)])
@pytest.mark.parametrize("shared", [None, SHARED], ids=["same tokenizer", "other tokenizer"])
def test_value_and_every_gradient_are_the_textbooks(
    shared: SharedTokens | None, ce_weight: float, num_sampled: int, trains_lift: bool
) -> None:
    sizes, num_answers = ((25, 25), ROWS) if shared is None else ((24, 30), 90)
    pair = pair_of(vocabularies=sizes, num_answers=num_answers)
    algorithm = dskd(pair, shared, trains_lift=trains_lift)
    assert len(list(algorithm.parameters())) == 1 + trains_lift
    loss = loss_of(pair, algorithm, shared, ce_weight=ce_weight, num_sampled=num_sampled)
    should, agrees_A = expected(pair, algorithm, shared, ce_weight=ce_weight, num_sampled=num_sampled)
    assert 4 < agrees_A.sum() < num_answers
    torch.testing.assert_close(loss.loss_sum, should)
    leaves = pair.hidden_RD, pair.weight_VD, pair.bias_V, *algorithm.parameters()
    torch.testing.assert_close(torch.autograd.grad(loss.loss_sum, leaves), torch.autograd.grad(should, leaves))


def test_it_begins_with_the_pseudo_inverses_of_the_heads() -> None:
    pair = pair_of(vocabularies=(25, 25), num_answers=ROWS)
    setup = Setup(
        student_head=pair.head.detached(), teacher_heads=lambda: {"": pair.teacher_head}, shared=None, device=CPU
    )
    algorithm = DualSpaceKD(setup, trains_lift=True)
    own_VD, theirs_VE = 0.8 * pair.weight_VD.detach(), pair.teacher_UE
    inverses = torch.linalg.pinv(own_VD) @ theirs_VE, torch.linalg.pinv(theirs_VE) @ own_VD
    for parameter, should in zip(algorithm.parameters(), inverses, strict=True):
        torch.testing.assert_close(parameter.detach().double(), should, rtol=1e-5, atol=1e-6)


def test_the_map_keeps_logits_where_it_can_also_of_heads_that_are_not_of_full_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    source_VD = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    mixed_DE = torch.randn(5, 9, generator=generator, dtype=torch.float64)  # 9 columns of rank 5
    source, target = OutputHead(weight_VD=source_VD), OutputHead(weight_VD=source_VD @ mixed_DE, logit_scale=0.25)
    map_ED = logit_preserving_map(source, target, CPU)
    hidden_RD = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(target.logits(hidden_RD @ map_ED.T), source.logits(hidden_RD))


@pytest.mark.parametrize("trains_lift", [False, True])
def test_both_are_projected_for_the_head_that_the_student_has_now(trains_lift: bool) -> None:
    pair = pair_of(vocabularies=(25, 25), num_answers=ROWS)
    algorithm = dskd(pair, None, trains_lift=trains_lift)
    before = loss_of(pair, algorithm, None, ce_weight=0.0).loss_sum.item()
    with torch.no_grad():
        pair.weight_VD.mul_(0.5)
    should, _ = expected(pair, algorithm, None, ce_weight=0.0)
    assert loss_of(pair, algorithm, None, ce_weight=0.0).loss_sum.item() == pytest.approx(should.item())
    assert before != pytest.approx(should.item())


def test_the_loss_does_not_depend_on_how_rows_are_split() -> None:
    pair = pair_of(vocabularies=(25, 25), num_answers=ROWS)
    algorithm = dskd(pair, None)
    whole = loss_of(pair, algorithm, None, ce_weight=0.3).loss_sum
    parts = []
    for some in (slice(0, 50), slice(50, ROWS)):
        part = Pair(
            **{
                **{name: getattr(pair, name) for name in Pair.__slots__},
                "hidden_RD": pair.hidden_RD[some],
                "labels_R": pair.labels_R[some],
                "teacher_AE": pair.teacher_AE[some],
            }
        )
        parts.append(loss_of(part, algorithm, None, ce_weight=0.3).loss_sum)
    torch.testing.assert_close(sum(parts), whole)


def test_what_is_reported_is_of_the_models_and_not_of_their_projections() -> None:
    pair = pair_of(vocabularies=(25, 25), num_answers=ROWS)
    algorithm = dskd(pair, None)
    objective = Distillation(
        terms=Terms(divergence=reverse_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.0, with_entropies=True, top_k=3),
        teacher_head=TeacherHead(Service(pair), vocabulary_size=25, device=CPU),
        algorithm=algorithm,
    )
    loss = objective(
        StudentRows(hidden_RD=pair.hidden_RD, head=pair.head, labels_R=pair.labels_R), Rows(rows_RD=pair.teacher_AE)
    )
    z_s, z_t = pair.head.logits(pair.hidden_RD).detach(), pair.teacher_head.logits(pair.teacher_AE)
    q, p = textbook.softmax(z_s), textbook.softmax(z_t)
    torch.testing.assert_close(loss.student_entropy_R, -(q * q.log()).sum(-1))
    torch.testing.assert_close(loss.teacher_entropy_R, -(p * p.log()).sum(-1))
    torch.testing.assert_close(loss.cross_entropy_R, textbook.cross_entropy(z_s, pair.labels_R))
    agrees_R = z_s.argmax(-1) == z_t.argmax(-1)
    assert 0 < loss.top1_agreement_R.sum() <= agrees_R.sum()
    assert (loss.top1_agreement_R.bool() <= agrees_R).all()
    assert len(loss.topk_overlap_R) == 0


def test_no_matrix_of_rows_by_vocabulary_is_made_or_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(2000, 8, generator=generator).requires_grad_()
    teacher_VE = torch.randn(2000, 12, generator=generator)
    hidden_RD, teacher_RE = torch.randn(4096, 8).requires_grad_(), torch.randn(4096, 12)
    labels_R = torch.randint(2000, (4096,), generator=generator)
    head = OutputHead(weight_VD=weight_VD)
    algorithm = DualSpaceKD(
        Setup(
            student_head=head.detached(),
            teacher_heads=lambda: {"": OutputHead(weight_VD=teacher_VE)},
            shared=None,
            device=CPU,
        )
    )
    objective = Distillation(
        terms=Terms(divergence=forward_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.5),
        teacher_head=TeacherHead(_Fixed(teacher_VE), vocabulary_size=2000, device=CPU),
        algorithm=algorithm,
    )
    with TensorWatch() as watch, SavedTensors() as saved:
        loss = objective(StudentRows(hidden_RD=hidden_RD, head=head, labels_R=labels_R), Rows(rows_RD=teacher_RE))
        loss.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert max(saved.numels) <= 4096 * 12
    assert watch.largest_bytes <= 4 * 2048 * 2000  # a chunk's gradient, in float32
