"""Dual space by attention is the textbook's, in value and in the gradient of all that it trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdmesh.alignment.vocabularies import SharedTokens
from kdmesh.losses import OutputHead, reverse_kl
from kdmesh.types import TokenSequence
from kdmesh_trainer.algorithms.dskd_attention import AttendingDualSpaceKD
from kdmesh_trainer.algorithms.seam import LossRows, Setup, Terms
from kdmesh_trainer.data.encoding.sides import Chunks, InChunks
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.sources.batches import PanelPart, PanelRows
from tests.support import textbook_losses as textbook
from tests.support.trainer_parts import Rows

CPU = torch.device("cpu")
OWN, THEIRS, D, E = 24, 30, 6, 9
KD_WEIGHT, TEMPERATURE = 0.7, 2.0
SHARED = SharedTokens(
    student_ids=np.arange(20, dtype=np.int32) + 3,
    teacher_ids=np.random.default_rng(0).permutation(THEIRS)[:20].astype(np.int32),
)


class Service:
    """A teacher's head that is a matrix."""

    def __init__(self, weight_UE: Tensor) -> None:
        self._weight_UE = weight_UE

    def head(self) -> tuple[OutputHead, int]:
        return OutputHead(weight_VD=self._weight_UE), 1


def sequence(random: np.random.Generator, vocabulary: int, length: int) -> TokenSequence:
    positions = np.sort(random.choice(length - 1, size=length // 2, replace=False)).astype(np.int32)
    return TokenSequence(token_ids=random.integers(0, vocabulary, length).astype(np.int32), positions=positions)


def pairs(seed: int) -> tuple[InChunks, ...]:
    random = np.random.default_rng(seed)
    one = np.zeros(1, np.int32), np.ones(1, np.int32)
    chunks = Chunks(student_begins=one[0], student_ends=one[1], teacher_begins=one[0], teacher_ends=one[1])
    found = []
    for own, theirs in ((9, 14), (20, 8)):
        student = sequence(random, OWN, own)
        found.append(
            InChunks(
                token_ids=student.token_ids,
                positions=student.positions,
                teacher=sequence(random, THEIRS, theirs),
                chunks=chunks,
            )
        )
    return tuple(found)


def textbook_loss(
    sequences: tuple[InChunks, ...],
    leaves: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    algorithm: AttendingDualSpaceKD,
    ce_weight: float,
) -> Tensor:
    """Sequence by sequence and row by row."""
    (hidden_RD, weight_VD), (teacher_AE, weight_UE) = leaves, teacher
    fixed_VD = weight_VD.detach()
    own_spread, their_spread = fixed_VD.float().std().double(), weight_UE.float().std().double()
    loss, own_row, their_row = torch.zeros((), dtype=torch.float64), 0, 0
    for s in sequences:
        h_s = hidden_RD[own_row : own_row + s.num_rows]
        h_t = teacher_AE[their_row : their_row + s.teacher.num_rows]
        own_row, their_row = own_row + s.num_rows, their_row + s.teacher.num_rows
        queries, keys = [], []
        for position in s.positions:
            now, then = s.token_ids[position], s.token_ids[position + 1]
            queries.append(algorithm.query @ torch.cat([fixed_VD[now], fixed_VD[then]]) / own_spread)
        for position in s.teacher.positions:
            now, then = s.teacher.token_ids[position], s.teacher.token_ids[position + 1]
            keys.append(torch.cat([weight_UE[now], weight_UE[then]]) / their_spread)
        scores = torch.stack([torch.stack([q @ k for k in keys]) for q in queries]) / (2 * E) ** 0.5
        t2s = textbook.softmax(scores) @ (h_t @ algorithm.teacher_to_student.T)
        lift_ED = algorithm.student_to_teacher
        if lift_ED is None:
            theirs = torch.linalg.pinv(weight_UE[SHARED.teacher_ids.tolist()])
            lift_ED = theirs @ fixed_VD[SHARED.student_ids.tolist()]
        s2t = textbook.softmax(scores.T) @ (h_s @ lift_ED.T)
        labels = torch.from_numpy(s.labels.astype(np.int64))
        z_s, z_t2s = h_s @ weight_VD.T, t2s @ fixed_VD.T
        p, q = textbook.softmax(z_t2s.detach(), TEMPERATURE), textbook.softmax(z_s, TEMPERATURE)
        lifted, whole = (textbook.softmax(h @ weight_UE.T, TEMPERATURE) for h in (s2t, h_t))
        loss = loss + KD_WEIGHT * textbook.cross_entropy(z_t2s, labels).sum()
        loss = loss + KD_WEIGHT * textbook.kullback_leibler(q, p).sum()
        loss = loss + KD_WEIGHT * textbook.kullback_leibler(lifted, whole).sum()
        loss = loss + ce_weight * textbook.cross_entropy(z_s, labels).sum()
    return loss


@pytest.mark.parametrize(("ce_weight", "trains_lift"), [(0.0, False), (0.3, False), (0.3, True)])
def test_value_and_every_gradient_are_the_textbooks(ce_weight: float, trains_lift: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sequences = pairs(seed=1)
    num_rows, num_answers = (
        sum(side.num_rows for side in sides) for sides in (sequences, [s.teacher for s in sequences])
    )
    hidden_RD, weight_VD = normal(num_rows, D).requires_grad_(), normal(OWN, D).requires_grad_()
    teacher_AE, weight_UE = normal(num_answers, E), normal(THEIRS, E)
    head, teacher_head = OutputHead(weight_VD=weight_VD), OutputHead(weight_VD=weight_UE)
    setup = Setup(student_head=head.detached(), teacher_heads=lambda: {"": teacher_head}, shared=SHARED, device=CPU)
    algorithm = AttendingDualSpaceKD(setup, trains_lift=trains_lift).double()
    part = PanelPart(name="", rows=Rows(rows_RD=teacher_AE), index_R=None, num_tokens=22, wait_s=0.0)
    rows = LossRows(
        hidden_RD=hidden_RD,
        head=head,
        labels_R=torch.from_numpy(np.concatenate([s.labels for s in sequences]).astype(np.int64)),
        num_sampled=0,
        sequences=sequences,
        teacher=PanelRows(parts=(part,)),
        heads=TeacherHead(Service(weight_UE), vocabulary_size=THEIRS, device=CPU, shared=SHARED),
    )
    terms = Terms(divergence=reverse_kl, temperature=TEMPERATURE, kd_weight=KD_WEIGHT, ce_weight=ce_weight)
    loss = algorithm(rows, terms)
    should = textbook_loss(sequences, (hidden_RD, weight_VD), (teacher_AE, weight_UE), algorithm, ce_weight)
    torch.testing.assert_close(loss.loss_sum, should)
    leaves = hidden_RD, weight_VD, *algorithm.parameters()
    torch.testing.assert_close(torch.autograd.grad(loss.loss_sum, leaves), torch.autograd.grad(should, leaves))
    assert len(loss.divergence_R) == num_rows


def test_a_row_begins_by_attending_to_the_same_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(12, 8, generator=generator)
    weight_UE = (weight_VD @ torch.randn(8, 10, generator=generator)).repeat_interleave(1, 0)
    shared = SharedTokens(student_ids=np.arange(12, dtype=np.int32), teacher_ids=np.arange(12, dtype=np.int32))
    setup = Setup(
        student_head=OutputHead(weight_VD=weight_VD),
        teacher_heads=lambda: {"": OutputHead(weight_VD=weight_UE)},
        shared=shared,
        device=CPU,
    )
    algorithm = AttendingDualSpaceKD(setup)
    twice_VK = torch.cat([weight_VD, weight_VD], dim=1) / weight_VD.std()
    keys_UK = torch.cat([weight_UE, weight_UE], dim=1) / weight_UE.std()
    torch.testing.assert_close(twice_VK @ algorithm.query.detach().T, keys_UK, rtol=1e-4, atol=1e-4)
