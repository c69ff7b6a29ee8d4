"""Distillation over the tokens that two vocabularies share, on the rows that have an answer, is the textbook's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdmesh.alignment.vocabularies import SharedTokens
from kdmesh.losses import OutputHead, forward_kl
from kdmesh_trainer.algorithms.seam import StudentRows, Terms
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.objectives.objective import Distillation
from kdmesh_trainer.sources.batches import PanelPart, PanelRows
from tests.support import textbook_losses as textbook

SHARED = SharedTokens(
    student_ids=np.array([1, 3, 4, 9, 20], dtype=np.int32), teacher_ids=np.array([7, 0, 2, 30, 11], dtype=np.int32)
)


class Rows:
    """A teacher's answer."""

    weight_version = 4

    def __init__(self, rows_RD: Tensor) -> None:
        self.rows_RD = rows_RD


class Service:
    """A teacher's head, with padding."""

    def __init__(self, weight_VE: Tensor) -> None:
        self._head = OutputHead(weight_VD=weight_VE, bias_V=torch.linspace(-1, 1, len(weight_VE)).double())

    def head(self) -> tuple[OutputHead, int]:
        return self._head, Rows.weight_version


@pytest.mark.parametrize(("ce_weight", "num_sampled"), [(0.0, 0), (0.3, 0), (0.3, 5), (0.3, 12)])
def test_values_and_gradients_are_the_textbooks(ce_weight: float, num_sampled: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_RD, weight_VD = normal(12, 6).requires_grad_(), normal(25, 6).requires_grad_()
    index_R = torch.tensor([0, 3, 4, 7, 11])
    teacher_RE, weight_VE = normal(len(index_R), 9), normal(40, 9)
    labels_R = torch.randint(25, (12,), generator=generator)
    head = TeacherHead(Service(weight_VE), vocabulary_size=31, device=torch.device("cpu"), shared=SHARED)
    objective = Distillation(
        terms=Terms(divergence=forward_kl, temperature=2.0, kd_weight=0.7, ce_weight=ce_weight), teacher_head=head
    )
    part = PanelPart(name="", rows=Rows(teacher_RE), index_R=index_R, num_tokens=20, wait_s=0.0)
    rows = PanelRows(parts=(part,))
    loss = objective(
        StudentRows(
            hidden_RD=hidden_RD, head=OutputHead(weight_VD=weight_VD), labels_R=labels_R, num_sampled=num_sampled
        ),
        rows,
    )

    z_RV = hidden_RD @ weight_VD.T
    teacher_RV = teacher_RE @ weight_VE.T + torch.linspace(-1, 1, 40).double()
    q_RS = textbook.softmax(z_RV[index_R][:, SHARED.student_ids], 2.0)
    p_RS = textbook.softmax(teacher_RV[:, SHARED.teacher_ids], 2.0)
    divergence_R, cross_entropy_R = textbook.kullback_leibler(p_RS, q_RS), textbook.cross_entropy(z_RV, labels_R)
    expected = 0.7 * divergence_R.sum() + ce_weight * cross_entropy_R[num_sampled:].sum()
    torch.testing.assert_close(loss.loss_sum, expected)
    torch.testing.assert_close(loss.divergence_R, divergence_R.detach())
    torch.testing.assert_close(loss.cross_entropy_R, cross_entropy_R.detach())
    leaves = hidden_RD, weight_VD
    torch.testing.assert_close(torch.autograd.grad(loss.loss_sum, leaves), torch.autograd.grad(expected, leaves))


def test_without_rows_there_is_no_loss_and_a_gradient_of_zeros() -> None:
    hidden_RD, weight_VD = torch.zeros(0, 6, requires_grad=True), torch.randn(25, 6, requires_grad=True)
    head = TeacherHead(
        Service(torch.randn(40, 9).double()), vocabulary_size=31, device=torch.device("cpu"), shared=SHARED
    )
    objective = Distillation(
        terms=Terms(divergence=forward_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.0), teacher_head=head
    )
    loss = objective(
        StudentRows(
            hidden_RD=hidden_RD, head=OutputHead(weight_VD=weight_VD), labels_R=torch.zeros(0, dtype=torch.int64)
        ),
        None,
    )
    loss.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert loss.loss_sum.item() == 0
    assert weight_VD.grad is not None and weight_VD.grad.abs().max() == 0
